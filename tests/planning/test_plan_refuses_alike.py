"""Random combinations of degrees: `nanovl plan` plans what the trainer builds, and refuses what it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanovl.build import check_parallelism, resolve_sizes
from nanovl.config.schema import Job
from nanovl.device import Modes
from nanovl.errors import ConfigError
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.parallelisms.apply import parallelize
from nanovl.planning.estimate import plan, question
from nanovl.planning.hardware import GPUS
from nanovl.registry import read_job, resolve_model

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
H100 = GPUS["NVIDIA H100 80GB HBM3"]
CHOICES: dict[str, tuple[object, ...]] = {
    "parallelism.data_parallel_replicate_degree": (1, 1, 1, 2),
    "parallelism.tensor_parallel_degree": (1, 1, 2, 4, 3),
    "parallelism.pipeline_parallel_degree": (1, 1, 2, 4),
    "parallelism.context_parallel_degree": (1, 1, 2),
    "parallelism.expert_parallel_degree": (1, 2, 4),
    "parallelism.expert_tensor_parallel_degree": (1, 1, 1, 2),
    "parallelism.context_parallel_method": ("allgather", "ring", "ulysses"),
    "parallelism.pipeline_parallel_schedule": (
        "1F1B",
        "GPipe",
        "Interleaved1F1B",
        "ZBVZeroBubble",
        "DualPipeV",
    ),
    "training.global_batch_size": (16, 32, 48, 64),
    "training.local_batch_size": (1, 2, 0),
    "activation_checkpoint.mode": ("none", "full", "op"),
    "model.name": ("qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"),
}


def sampled(random: Random) -> tuple[int, list[str]]:
    """A number of ranks, and flags."""
    chosen = {key: random.choice(values) for key, values in CHOICES.items()}
    return random.choice((4, 8, 16)), ["--model.flavor=debug", *(f"--{k}={v}" for k, v in chosen.items())]


def refused_by_trainer(job: Job, world: int) -> list[str]:
    """What the trainer says of the job, on rank 0 of a world of GPUs; none where it goes on to train."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        check_parallelism(job, world, torch.device("cuda"))
        spec = resolve_model(job.model, job.tokenizer.vocab_size)
        job, _ = resolve_sizes(job, spec, world)
        mesh = build_mesh(job.parallelism, world, torch.device("cpu"))
        with torch.device("meta"):
            model = spec.family.model(spec.config)
        parallelize(model, job, mesh, Modes(torch.bfloat16, False, torch.device("cuda")), Log(-1))
    except ConfigError as error:
        return error.mistakes
    finally:
        dist.destroy_process_group()
    return []


def refused_by_plan(job: Job, world: int) -> list[str]:
    try:
        found = plan(question(job, world, H100), H100, 0.5, 8)
    except ConfigError as error:
        return error.mistakes
    assert found.times.step > 0
    assert len(found.ranks) == job.parallelism.pipeline_parallel_degree
    return []


# of the first 8, 3 are accepted and use every axis
@pytest.mark.parametrize(("seed", "tries"), [(0, 8), pytest.param(1, 300, marks=pytest.mark.slow)])
def test_plan_accepts_what_the_trainer_does(seed: int, tries: int) -> None:
    random, accepted, refused = Random(seed), Counter[str](), 0
    for _ in range(tries):
        world, flags = sampled(random)
        try:
            job = read_job([CONFIG], flags, world_size=world)
        except ConfigError:  # of both alike, before anything else
            continue
        mistakes = refused_by_trainer(job, world)
        assert refused_by_plan(job, world) == mistakes, (world, flags)
        refused += bool(mistakes)
        accepted.update(flags if not mistakes else ())
    assert refused > 0
    degrees = ("tensor", "pipeline", "context", "expert")
    assert all(any(accepted[f"--parallelism.{d}_parallel_degree={n}"] for n in (2, 4)) for d in degrees), (
        accepted
    )
