"""A loss or gradient that is not finite, on whichever rank, skips the step on all of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import VOCAB, job_of

from nanovl.build import build_model
from nanovl.device import Modes
from nanovl.dist import RankFailed, fork_ranks
from nanovl.inference.load import load
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.metrics import read_metrics
from nanovl.optim.gradients import nonfinite_gradients
from nanovl.registry import read_job, resolve_model
from nanovl.step import StepResult, train_step
from nanovl.trainer import train
from nanovl.verify import CPU, made_up_rows

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"


def poisoned(rank: int, poison: bool) -> tuple[float, float, bool, list[str]]:
    job = job_of("qwen3", local=4)
    mesh = build_mesh(job.parallelism, 2, CPU)
    spec = resolve_model(job.model, VOCAB)
    model = build_model(job, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    batch = made_up_rows(job, VOCAB, 0, range(rank, 8, 2))
    if poison and rank == 1:
        batch["weights_BT"][0, 3] = math.inf
        batch["targets_BT"][0, 3] = 5
    result = train_step(model, [batch], max_norm=1.0, chunk_tokens=16)
    return result.loss, result.grad_norm, result.finite, nonfinite_gradients(model.named_parameters())


def test_one_bad_row_on_one_rank_is_seen_by_all() -> None:
    healthy = fork_ranks(poisoned, 2, False)
    assert healthy[0] == healthy[1]
    assert healthy[0][2]
    assert healthy[0][3] == []
    for _, _, finite, names in fork_ranks(poisoned, 2, True):
        assert not finite
        assert "lm_head.weight" in names or "embed_tokens.weight" in names


def train_rank(rank: int, flags: list[str]) -> None:
    train(read_job([CONFIG], flags, world_size=2))


def test_steps_are_skipped_and_counted_and_too_many_in_a_row_end_the_run(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    """An absurd rate ruins the weights in step 1: steps 2 and 3 are skipped, step 4 is one too many."""
    flags = [
        *tiny_flags,
        f"--job.run_dir={tmp_path / 'run'}",
        "--training.steps=10",
        "--training.max_skipped_steps=2",
        "--optimizer.lr=1e30",
        "--lr_schedule.warmup_steps=0",
    ]
    with pytest.raises(RankFailed, match=r"step 4: 3 steps in a row without finite loss and gradients"):
        fork_ranks(train_rank, 2, flags)
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "optim/skipped_steps" in r]
    assert [r["optim/skipped_steps"] for r in records] == [0, 1, 2]
    dump = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert dump["step"] == 4
    assert dump["gradients"]


def without_targets(rank: int) -> tuple[float, float, bool]:
    job = job_of("qwen3", local=4)
    mesh = build_mesh(job.parallelism, 2, CPU)
    spec = resolve_model(job.model, VOCAB)
    model = build_model(job, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    batch = made_up_rows(job, VOCAB, 0, range(rank, 8, 2))
    batch["targets_BT"].fill_(-100)
    result = train_step(model, [batch], max_norm=1.0, chunk_tokens=16)
    return result.loss, result.grad_norm, result.finite


def test_a_step_without_any_target_learns_nothing_and_is_no_mistake() -> None:
    """torchtitan divides by the number of targets, and 0 / 0 ends the run."""
    assert fork_ranks(without_targets, 2) == [(0.0, 0.0, True)] * 2


def test_a_skipped_step_moves_no_bias_of_experts(
    tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(*args: Any, **kwargs: Any) -> StepResult:
        result = train_step(*args, **kwargs)
        return (
            replace(result, loss=math.nan) if (tmp_path / "run/checkpoints/step_000001").exists() else result
        )

    monkeypatch.setattr("nanovl.trainer.train_step", ruined)
    flags = [
        *tiny_flags,
        f"--job.run_dir={tmp_path / 'run'}",
        "--training.steps=2",
        "--checkpoint.interval=1",
    ]
    flags += ["--model.name=qwen3_moe", "--model.blocks.full.ffn.load_balancing=bias"]
    train(read_job([CONFIG], flags))
    first, second = (
        load(tmp_path / "run" / "checkpoints" / f"step_00000{step}", device="cpu").model.state_dict()
        for step in (1, 2)
    )
    bias = "layers.0.ffn.router.expert_bias"
    assert first[bias].abs().max() > 0
    assert torch.equal(first[bias], second[bias])
