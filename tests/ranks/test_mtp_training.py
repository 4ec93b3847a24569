"""A run with multi-token prediction: logged, evaluated, sampled, saved, resumed; a pipeline logs the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nanovl.dist import fork_ranks
from nanovl.inference.load import load
from nanovl.metrics import read_metrics
from nanovl.registry import read_job
from nanovl.trainer import train

CONFIGS = Path(__file__).parents[2] / "configs"
FLAGS = [
    "--training.steps=4",
    "--checkpoint.interval=2",
    "--validation.freq=2",
    "--validation.max_bytes=2000",
    "--validation.final_max_bytes=2000",
    '--sampling.prompts=["def "]',
    "--sampling.max_tokens=3",
]


def run(
    folder: Path, flags: list[str], *, world: int = 1, mtp: bool = True, resume: bool = False
) -> list[dict[str, Any]]:
    """Records of all steps."""
    files = [CONFIGS / "debug.toml", *([CONFIGS / "overlays" / "mtp.toml"] if mtp else [])]
    job = read_job(files, [*flags, *FLAGS, f"--job.run_dir={folder}"], world_size=world)
    fork_ranks(_train, world, job, resume)
    return [record for record in read_metrics(folder / "metrics.jsonl") if "train/loss" in record]


def _train(rank: int, job: Any, resume: bool) -> None:
    train(job, resume=resume)


def losses(records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(record["train/loss"], record["train/mtp_loss_1"]) for record in records]


def test_from_start_to_resume(tmp_path: Path, tiny_flags: list[str]) -> None:
    whole = run(tmp_path / "whole", tiny_flags)
    plain = run(tmp_path / "plain", tiny_flags, mtp=False)
    assert len(whole) == 4
    assert (
        whole[0]["train/loss"] == plain[0]["train/loss"]
    )  # its weights begin as without, and it is not in the loss
    assert whole[1]["train/loss"] != plain[1]["train/loss"]
    assert whole[0]["flops"] > plain[0]["flops"]
    assert "train/mtp_loss_1" not in plain[0]
    assert abs(whole[0]["train/mtp_loss_1"] - whole[0]["train/loss"]) < 0.1  # both guess
    assert (tmp_path / "whole" / "samples.jsonl").stat().st_size > 0

    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    assert losses(run(tmp_path / "run", tiny_flags, resume=True)) == losses(whole)
    names = [name for name, _ in load(tmp_path / "run", device="cpu").model.named_parameters()]
    assert "mtp.2.eh_proj.weight" in names


def test_a_pipeline_logs_the_same(tmp_path: Path, tiny_flags: list[str]) -> None:
    expected = run(tmp_path / "one", tiny_flags)
    flags = ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"]
    found = run(tmp_path / "two", [*tiny_flags, *flags], world=2)
    for mine, theirs in zip(losses(found), losses(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
