"""`nanovl verify`: is a job on its mesh the same as on one rank? Asked on this machine, of the job's small likeness."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nanovl.config_tools import parse_job_flags
from nanovl.errors import ConfigError
from nanovl.log import out, table

if TYPE_CHECKING:
    from nanovl.config.schema import Job, Parallelism
    from nanovl.verify import Difference

LOSS, OTHERS = 1e-5, 1e-4
"""Relative differences that float32 rounding explains."""


def main(argv: list[str]) -> int:
    """`nanovl verify --config a.toml --world-size 8 [--steps 5]`. Exit code 0: the same; 1: not."""
    asked = parse_job_flags(
        argv,
        "verify",
        {
            "--world-size=N": "ranks of the job, forked on this machine (default 8)",
            "--steps=K": "optimizer steps to compare (default 5)",
        },
    )
    world, steps = (_count(asked.switches, *pair) for pair in (("--world-size", 8), ("--steps", 5)))
    from nanovl.registry import read_job, resolve_model, trained_vocabulary
    from nanovl.shrink import shrink

    job = read_job(asked.files, asked.flags, world_size=world)
    spec = resolve_model(job.model, trained_vocabulary(job))
    small = shrink(job, spec.config, world)
    return report(small, world, steps)


def report(job: Job, world: int, steps: int) -> int:
    """Compare `job` with one rank, first each parallelism alone, then as it is; prints the table."""
    import torch

    from nanovl.build import check_parallelism
    from nanovl.dist import RankFailed
    from nanovl.registry import resolve_model
    from nanovl.verify import compare, on_one_rank, outcome_on

    config = resolve_model(job.model, job.tokenizer.vocab_size).config
    check_parallelism(job, world, torch.device("cpu"))
    out(
        f"  {job.model.name} of {config.num_hidden_layers} layers, {config.hidden_size} channels; "
        f"{job.training.global_batch_size} rows of {job.training.seq_len} tokens, {steps} steps, float32"
    )
    expected = outcome_on(on_one_rank(job), 1, steps)
    rows: list[list[object]] = []
    failures: list[str] = []
    for name, ranks, parallelism in _meshes(job.parallelism, world):
        try:
            found = outcome_on(replace(job, parallelism=parallelism), ranks, steps)
            if found.initial != expected.initial:
                failures.append(f"{name}: initial weights differ")
            far = compare(found, expected)
            rows.append([name, ranks, *_cells(far), "yes" if same(far) else "NO"])
            if not same(far):
                scale = "the gradients' norm" if far.norm > far.gradient else far.worst_gradient
                failures.append(f"{name}: worst in {scale} and {far.worst_weight}")
        except (RankFailed, AssertionError) as error:
            rows.append([name, ranks, "-", "-", "-", "NO"])
            failures.append(f"{name}: {error}")
    out(table(["mesh", "ranks", "loss", "gradients", "weights", "as one rank"], rows))
    for failure in failures:
        out(f"  {failure}")
    return 1 if failures else 0


def same(far: Difference) -> bool:
    """Whether rounding explains the difference."""
    return far.loss < LOSS and max(far.norm, far.gradient, far.weight) < OTHERS


def _cells(far: Difference) -> list[object]:
    # gradients are compared clipped, which hides a wrong scale: the norm before shows it
    return [f"{value:.1e}" for value in (far.loss, max(far.norm, far.gradient), far.weight)]


def _meshes(asked: Parallelism, world: int) -> list[tuple[str, int, Parallelism]]:
    """Each parallelism of the job alone, with its name and ranks, then all of them together."""
    alone = replace(
        asked,
        data_parallel_replicate_degree=1,
        data_parallel_shard_degree=-1,
        tensor_parallel_degree=1,
        pipeline_parallel_degree=1,
        pipeline_parallel_layers=[],
        context_parallel_degree=1,
        expert_parallel_degree=1,
        expert_tensor_parallel_degree=1,
    )
    copies, tp, pp, cp, ep = (
        asked.data_parallel_replicate_degree,
        asked.tensor_parallel_degree,
        asked.pipeline_parallel_degree,
        asked.context_parallel_degree,
        asked.expert_parallel_degree,
    )
    data = world // (tp * pp * cp)
    found: list[tuple[str, int, Parallelism]] = []
    if data > 1:
        kind = "fsdp2" if copies == 1 else "ddp" if copies == data else "hsdp"
        found.append((kind, data, replace(alone, data_parallel_replicate_degree=copies)))
    if tp > 1:
        found.append(("tensor", tp, replace(alone, tensor_parallel_degree=tp)))
    if cp > 1:
        found.append(
            (f"context, {asked.context_parallel_method}", cp, replace(alone, context_parallel_degree=cp))
        )
    if pp > 1:
        pipeline = replace(
            alone,
            pipeline_parallel_degree=pp,
            pipeline_parallel_layers=asked.pipeline_parallel_layers,
        )
        found.append((f"pipeline, {asked.pipeline_parallel_schedule}", pp, pipeline))
    if ep > 1:
        found.append(("expert", ep, replace(alone, expert_parallel_degree=ep)))
    return [*found, ("all together", world, asked)] if len(found) != 1 else [(*found[0][:2], asked)]


def _count(switches: dict[str, str], name: str, default: int) -> int:
    value = switches.get(name, str(default))
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{name} {value}: wants a number of 1 or more")
    return int(value)
