"""Any mesh, same run: initial weights, data order, loss curve; and a resumed run goes on as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovl.config.schema import Job
from nanovl.dist import fork_ranks
from nanovl.inference.load import load
from nanovl.metrics import read_metrics
from nanovl.registry import read_job
from nanovl.trainer import train

Trained = tuple[list[float], dict[str, Tensor]]
"""Losses of all steps, and the final weights."""
CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
NANOCHAT = [
    "--model.name=nanochat",
    "--model.flavor=",
    "--model.depth=2",
    "--model.aspect_ratio=32",
    "--model.head_dim=16",
    "--model.max_position_embeddings=64",
    "--model.short_window_multiple=16",
    # a spike would multiply rounding errors: these widths do not bear the full rates
    "--lr_schedule.warmup_steps=30",
]


def job_of(world: int, flags: Sequence[str]) -> Job:
    job = read_job([CONFIG], flags, world_size=world)
    if job.model.name == "nanochat":
        job.model.overrides.pop("num_hidden_layers", None)
    return job


def train_rank(rank: int, job: Job, resume: bool) -> None:
    train(job, resume=resume)


def run(folder: Path, world: int, flags: Sequence[str], *, resume: bool = False) -> Trained:
    """Losses of all steps so far, and the final weights."""
    job = job_of(world, [*flags, f"--job.run_dir={folder}"])
    fork_ranks(train_rank, world, job, resume)
    losses = [r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]
    return losses, dict(load(folder, device="cpu").model.named_parameters())


def flags_for(family: str, tiny_flags: list[str]) -> list[str]:
    if family == "nanochat":
        return [f for f in tiny_flags if "num_hidden_layers" not in f] + NANOCHAT
    return tiny_flags


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("one")
    return {
        family: run(
            folder / family,
            1,
            [*flags_for(family, tiny_flags), "--training.steps=10", "--training.local_batch_size=8"],
        )
        for family in ("qwen3", "nanochat")
    }


MESHES = [
    # ranks, copies, rows at once: 8 rows a step, so 1 rank x 2 rows accumulates over 4 micro-batches
    (1, 1, 2),
    pytest.param(2, 1, 4, marks=pytest.mark.slow),
    (2, 1, 2),
    pytest.param(2, 2, 4, marks=pytest.mark.slow),
    pytest.param(4, 1, 2, marks=pytest.mark.slow),
    (4, 2, 1),
]


@pytest.mark.parametrize("family", ["qwen3", "nanochat"])
@pytest.mark.parametrize(("world", "copies", "rows"), MESHES)
def test_every_mesh_learns_as_one_rank(
    tmp_path: Path, tiny_flags: list[str], one_rank: dict[str, Trained], family: str, world: int, copies: int, rows: int
) -> None:  # fmt: skip
    flags = [
        *flags_for(family, tiny_flags),
        "--training.steps=10",
        f"--training.local_batch_size={rows}",
        f"--parallelism.data_parallel_replicate_degree={copies}",
    ]
    expected, expected_weights = one_rank[family]
    losses, weights = run(tmp_path / "run", world, flags)
    assert len(losses) == 10
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in weights.items():
        # AdamW turns the rounding of a near-zero gradient into a whole step, so single entries may differ
        if value.ndim == 2:
            assert (value - expected_weights[name]).norm() < 1e-3 * expected_weights[name].norm(), name


@pytest.mark.parametrize("family", ["qwen3", "nanochat"])
def test_resume_is_bit_equal(tmp_path: Path, tiny_flags: list[str], family: str) -> None:
    flags = [*flags_for(family, tiny_flags), "--training.steps=6", "--checkpoint.interval=3"]
    expected, expected_weights = run(tmp_path / "whole", 1, flags)
    killed_after_the_first_save(tmp_path / "whole", tmp_path / "run")
    losses, weights = run(tmp_path / "run", 1, flags, resume=True)
    assert losses == expected
    for name, value in weights.items():
        assert torch.equal(value, expected_weights[name]), name


@pytest.mark.parametrize("world", [1, 4])
def test_a_run_of_two_ranks_goes_on_with_another_number(
    tmp_path: Path, tiny_flags: list[str], world: int
) -> None:
    flags = [*tiny_flags, "--training.steps=6", "--checkpoint.interval=3"]
    expected, _ = run(tmp_path / "whole", 2, flags)
    killed_after_the_first_save(tmp_path / "whole", tmp_path / "run")
    losses, _ = run(tmp_path / "run", world, flags, resume=True)
    assert losses[:3] == expected[:3]
    assert losses[3:] == pytest.approx(
        expected[3:], rel=1e-5
    )  # another row anywhere would show in the third digit


def test_a_finished_run_can_be_extended(tmp_path: Path, tiny_flags: list[str]) -> None:
    constant = [*tiny_flags, "--lr_schedule.kind=constant"]
    expected, expected_weights = run(tmp_path / "whole", 1, [*constant, "--training.steps=5"])
    run(tmp_path / "run", 1, [*constant, "--training.steps=3"])
    losses, weights = run(tmp_path / "run", 1, [*constant, "--training.steps=5"], resume=True)
    assert losses == expected
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights.items())


def killed_after_the_first_save(whole: Path, copy: Path) -> None:
    """What a kill at step 5 leaves: the checkpoint of step 3, the log of later steps, half a save."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step_000006")
    shutil.copytree(copy / "checkpoints" / "step_000003", copy / "checkpoints" / "step_000006.tmp")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tr')
