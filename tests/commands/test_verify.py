"""`nanovl verify`: the table and exit code of a job that holds, and of one that is broken on purpose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from nanovl.errors import ConfigError
from nanovl.verify import Outcome, compare
from nanovl.verify_tools import main as verify

CONFIG = ["--config", str(Path(__file__).parents[2] / "configs" / "debug.toml")]


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the table by mesh."""
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 6}


def test_each_parallelism_and_all_together_are_as_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--world-size=4", "--steps=2", "--parallelism.tensor_parallel_degree=2"]
    flags.append("--checkpoint.initial_load_path=large weights")  # which no likeness could begin from
    assert verify([*CONFIG, *flags]) == 0
    text = capsys.readouterr().out
    assert "qwen3 of 4 layers, 64 channels; 4 rows of 32 tokens, 2 steps, float32" in text
    header, *found = rows(text).items()
    assert header == ("mesh", ["ranks", "loss", "gradients", "weights", "as one rank"])
    assert [(mesh, cells[0], cells[4]) for mesh, cells in found] == [
        ("fsdp2", "2", "yes"),
        ("tensor", "2", "yes"),
        ("all together", "4", "yes"),
    ]
    assert all(0 < float(cell) < 1e-4 for _, cells in found for cell in cells[2:4])


def test_averaged_gradients_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP's own habit, and torchtitan's under DDP: the sum of gradients is divided by the ranks."""
    sound: Any = FSDPModule.set_gradient_divide_factor

    def averaging(module: FSDPModule, factor: float) -> None:
        sound(module, factor * dist.get_world_size())

    monkeypatch.setattr(FSDPModule, "set_gradient_divide_factor", averaging)
    assert verify([*CONFIG, "--world-size=2", "--steps=1"]) == 1
    text = capsys.readouterr().out
    ranks, loss, gradients, _, same = rows(text)["fsdp2"]
    assert (ranks, same) == ("2", "NO")
    assert float(loss) < 1e-5  # the loss does not show it
    assert float(gradients) == pytest.approx(0.5, rel=1e-4)
    assert "fsdp2: worst in the gradients' norm and " in text


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="--steps 0: wants a number of 1 or more"):
        verify([*CONFIG, "--steps=0"])


def test_what_training_refuses_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_degree = 3 does not divide the 8 ranks"):
        verify([*CONFIG, "--parallelism.tensor_parallel_degree=3"])


def outcome(**gradients: list[float]) -> Outcome:
    return Outcome([1.0], [1.0], gradients={name: torch.tensor(value) for name, value in gradients.items()})


def test_a_lone_gradient_may_cancel_and_many_may_not() -> None:
    expected = outcome(many=[0.6, 0.8], few=[1e-5, 0.0], lone=[1e-5])
    few = compare(outcome(many=[0.6, 0.8], few=[1.1e-5, 0.0], lone=[1e-5]), expected)
    lone = compare(outcome(many=[0.6, 0.8], few=[1e-5, 0.0], lone=[1.1e-5]), expected)
    assert (few.worst_gradient, few.gradient) == ("few", pytest.approx(0.1, rel=1e-3))
    assert (lone.worst_gradient, lone.gradient) == ("lone", pytest.approx(1e-3, rel=1e-3))
    missing = compare(outcome(many=[0.6, 0.8], few=[1e-5, 0.0]), expected)
    assert (missing.worst_gradient, missing.gradient) == ("lone", float("inf"))
