"""A run that moves: saved on one mesh, it goes on on any other with the weights, moments and rows it would have had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanovl.config.schema import Job
from nanovl.dist import fork_ranks
from nanovl.metrics import read_metrics
from nanovl.registry import read_job
from nanovl.trainer import train

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
SAVED, MORE = 2, 5
DENSE = {
    "tp 2, fsdp 2": {"tensor": 2},
    "cp 2, fsdp 2": {"context": 2},
    "pp 2, fsdp 2": {"pipeline": 2},
    "hsdp 2 x 2": {"data_parallel_replicate": 2},
}
EXPERTS = {
    "ep 2, tp 2, fsdp 2": {"expert": 2, "tensor": 2},
    "pp 2, ep 2": {"pipeline": 2, "expert": 2},
    "ep 4": {"expert": 4},
}


def train_rank(rank: int, job: Job, resume: bool) -> None:
    train(job, resume=resume)


def losses(
    folder: Path, flags: list[str], steps: int, degrees: dict[str, int], world: int = 4
) -> list[float]:
    """Of all steps of the run in `folder`, which goes on if it is there."""
    mine = [
        *flags,
        "--training.local_batch_size=1",
        "--lr_schedule.kind=constant",  # which does not change where the run becomes longer
        f"--training.steps={steps}",
        f"--job.run_dir={folder}",
        *(
            f"--parallelism.{name}{'' if name.startswith('data') else '_parallel'}_degree={degree}"
            for name, degree in degrees.items()
        ),
    ]
    fork_ranks(train_rank, world, read_job([CONFIG], mine, world_size=world), folder.exists())
    return [r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]


def moves(folder: Path, flags: list[str], meshes: dict[str, dict[str, int]]) -> None:
    """From each mesh to the next, the last to the first; the next losses are those of one rank that never stopped."""
    expected = losses(folder / "one", flags, SAVED + MORE, {}, world=1)
    names = list(meshes)
    for here, there in zip(names, [*names[1:], names[0]], strict=True):
        losses(folder / here, flags, SAVED, meshes[here])
        shutil.copytree(folder / here, folder / "moved", dirs_exist_ok=True)
        found = losses(folder / "moved", flags, SAVED + MORE, meshes[there])
        assert found == pytest.approx(expected, rel=1e-5), f"{here} to {there}"
        shutil.rmtree(folder / "moved")


def test_from_tensor_to_pipeline_and_on(tmp_path: Path, tiny_flags: list[str]) -> None:
    chosen = ("tp 2, fsdp 2", "pp 2, fsdp 2")
    moves(tmp_path, tiny_flags, {name: DENSE[name] for name in chosen})


@pytest.mark.slow
def test_between_all(tmp_path: Path, tiny_flags: list[str]) -> None:
    moves(tmp_path, tiny_flags, DENSE)


@pytest.mark.slow
def test_experts_between_all(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [*tiny_flags, "--model.name=qwen3_moe", "--model.blocks.full.ffn.load_balancing=bias"]
    moves(tmp_path, flags, EXPERTS)
