"""Which layers go to which rank of a pipeline, and why a model or a job cannot be split so.

Stages follow each other over the ranks, `loop` or `v`, with 3 ranks:

    rank        0  1  2                rank        0  1  2
    loop        0  1  2                v           0  1  2
                3  4  5                            5  4  3
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

from torch import nn

from nanovl.config.check import data_parallel_degree
from nanovl.config.schema import Job, Parallelism
from nanovl.flops import causal_keys
from nanovl.mesh import Mesh
from nanovl.spec import Model

ONE_STAGE = ("GPipe", "1F1B")
"""Schedules with one stage a rank."""
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules with two, so that a rank holds the first and the last."""
IN_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")
"""Schedules that go through the micro-batches in equal rounds."""
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules that fill their bubbles with weights' gradients."""


def split(model: Model, job: Job, mesh: Mesh) -> tuple[list[Model], frozenset[str]]:
    """This rank's stages of a meta-device model, and which of its parameters are copies of another rank's.

    The copy is of a tied weight: the last stage keeps it for the head.
    """
    ranks = mesh.size("pp")
    if ranks == 1:
        return [model], frozenset()
    config, rank = job.parallelism, mesh.rank("pp")
    counts = layers_of_stages(model, job)
    stages = stages_of(rank, config)
    ends = [0, *accumulate(counts)]
    parts = [_part(model, ends[s], ends[s + 1], s == 0, s == len(counts) - 1) for s in stages]
    tied = set(model.first_children) & set(model.last_children)
    has_copies = len(counts) - 1 in stages and 0 not in stages
    names = (name for name, _ in parts[-1].named_parameters() if name.split(".")[0] in tied)
    return parts, frozenset(names) if has_copies else frozenset()


def stages_per_rank(config: Parallelism) -> int:
    """As asked, or the fewest the schedule works with."""
    return config.pipeline_parallel_stages_per_rank or (
        1 if config.pipeline_parallel_schedule in ONE_STAGE else 2
    )


def stages_of(rank: int, config: Parallelism) -> list[int]:
    """The stages that a rank of the pipeline holds, first to last."""
    ranks, held = config.pipeline_parallel_degree, stages_per_rank(config)
    if config.pipeline_parallel_schedule in V_SHAPED:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + turn * ranks for turn in range(held)]


def layers_of_stages(model: Model, job: Job) -> list[int]:
    """How many layers each stage gets: as asked, or so that the costliest stage is as cheap as can be."""
    config = job.parallelism
    if config.pipeline_parallel_layers:
        return config.pipeline_parallel_layers
    *layers, head = costs(model, job.training.seq_len)
    return balanced(layers, config.pipeline_parallel_degree * stages_per_rank(config), head)


def costs(model: Model, seq_len: int) -> list[float]:
    """Forward FLOPs a token of every layer in a row of `seq_len`, and of all that is no layer: the head."""
    mean_keys, found = causal_keys(seq_len), []
    with _layers_of(model, {}):
        rest = model.forward_flops_per_token(mean_keys)
    for index, block in model.layers.items():
        with _layers_of(model, {index: block}):
            found.append(model.forward_flops_per_token(mean_keys) - rest)
    return [*found, rest]


@contextmanager
def _layers_of(model: Model, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """`model` with these layers alone."""
    whole, model.layers = model.layers, nn.ModuleDict(layers)
    try:
        yield
    finally:
        model.layers = whole


def balanced(layers: Sequence[float], stages: int, head: float) -> list[int]:
    """Layers of each stage: the least largest cost, then the evenest; the last stage has the head too."""
    ends = [0.0, *accumulate(layers)]
    # best[n]: cheapest way to give the first n layers to the stages so far, (largest cost, sum of squares, cuts)
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(stages):
        extra = head if stage == stages - 1 else 0.0
        left = stages - 1 - stage
        best = {
            n: min(
                (max(most, cost), squares + cost * cost, (*cuts, n))
                for m, (most, squares, cuts) in best.items()
                if m < n
                for cost in [ends[n] - ends[m] + extra]
            )
            for n in range(stage + 1, len(layers) - left + 1)
        }
    return [b - a for a, b in pairwise(best[len(layers)][2])]


def _part(model: Model, start: int, stop: int, first: bool, last: bool) -> Model:
    """A copy with layers `start` to `stop` and what begins or ends the model; all names stay."""
    with _layers_of(model, dict(list(model.layers.items())[start:stop])):
        part = copy.deepcopy(model)
    kept = {*(part.first_children if first else ()), *(part.last_children if last else ())}
    for name in {*part.first_children, *part.last_children} - kept:
        delattr(part, name)
    return part


def mistakes(model: Model, job: Job, world_size: int) -> list[str]:
    """Why this model cannot be split as asked, one line each."""
    config = job.parallelism
    if config.pipeline_parallel_degree == 1:
        return (
            [
                "parallelism.pipeline_parallel_layers: there are no stages with pipeline_parallel_degree = 1; remove it"
            ]
            if config.pipeline_parallel_layers
            else []
        )
    return _stage_mistakes(config) or [
        *_layer_mistakes(model, config),
        *_micro_batch_mistakes(job, world_size),
        *_sum_mistakes(config),
    ]


def _stage_mistakes(config: Parallelism) -> list[str]:
    schedule, held = config.pipeline_parallel_schedule, stages_per_rank(config)
    where = f"parallelism.pipeline_parallel_stages_per_rank = {held}: {schedule}"
    if schedule in ONE_STAGE and held != 1:
        return [
            f"{where} keeps one stage on a rank; use 1, or pipeline_parallel_schedule = 'Interleaved1F1B'"
        ]
    if schedule in V_SHAPED and held != 2:
        return [
            f"{where} keeps two stages on a rank; use 2, or pipeline_parallel_schedule = 'Interleaved1F1B'"
        ]
    if schedule not in ONE_STAGE and held == 1:
        return [f"{where} keeps two stages or more on a rank; use 2, or pipeline_parallel_schedule = '1F1B'"]
    return []


def _layer_mistakes(model: Model, config: Parallelism) -> list[str]:
    ranks, held, layers = config.pipeline_parallel_degree, stages_per_rank(config), len(model.layers)
    stages, counts = ranks * held, config.pipeline_parallel_layers
    made_of = f"{ranks} ranks x {held} stages = {stages} stages" if held > 1 else f"{stages} stages"
    if layers < stages:
        degree = max(1, layers // held)
        return [
            f"parallelism.pipeline_parallel_degree = {ranks}: the model's {layers} layers are too few for {made_of}; "
            f"use {degree}" + (", or a schedule with one stage a rank" if held > 1 else "")
        ]
    wrong = []
    where = f"parallelism.pipeline_parallel_layers = {counts}"
    even = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    if counts and len(counts) != stages:
        wrong.append(f"{where}: names {len(counts)} stages, there are {made_of}; use {even}, or leave it out")
    elif counts and sum(counts) != layers:
        wrong.append(
            f"{where}: adds up to {sum(counts)}, the model has {layers} layers; use {even}, or leave it out"
        )
    if any(count < 1 for count in counts):
        wrong.append(f"{where}: every stage wants a layer; use {even}, or leave it out")
    return wrong


def _micro_batch_mistakes(job: Job, world_size: int) -> list[str]:
    """Micro-batches that the schedule cannot order. Sizes that are not known yet are looked at again once they are."""
    config, rows, local = job.parallelism, job.training.global_batch_size, job.training.local_batch_size
    schedule, ranks, dp = (
        config.pipeline_parallel_schedule,
        config.pipeline_parallel_degree,
        data_parallel_degree(job, world_size),
    )
    fewest = next(n for n in range(2, 2 * ranks + 1) if runs(schedule, ranks, n))
    if local == 0:
        most = max(1, rows // (dp * max(fewest, ranks)))
        return [
            "training.local_batch_size = 0: all rows of a rank are one micro-batch, which keeps one stage of the "
            f"pipeline busy at a time; use {most if rows else 1} or less"
        ]
    found = rows // (dp * local)
    if rows == 0 or rows % (dp * local) or runs(schedule, ranks, found):
        return []  # check.py speaks of rows that do not divide
    lower = next((n for n in range(found - 1, 1, -1) if runs(schedule, ranks, n)), None)
    higher = next(n for n in range(found + 1, found + 2 * ranks + 2) if runs(schedule, ranks, n))
    near = " or ".join(str(n * dp * local) for n in (lower, higher) if n is not None)
    return [
        f"training.global_batch_size = {rows}: {found} micro-batches of {dp} x {local} rows, and {schedule} on {ranks} "
        f"ranks {_wants(schedule, ranks, found)}; use {near}, or set training.local_batch_size"
    ]


def _sum_mistakes(config: Parallelism) -> list[str]:
    if config.fsdp_reduce_last_only is not False:
        return []
    return [
        "parallelism.fsdp_reduce_last_only = false: a pipeline sums gradients over data ranks once a step, after a "
        "stage's last backward; leave it out"
    ]


def runs(schedule: str, ranks: int, micro_batches: int) -> bool:
    """Whether `schedule` can order that many micro-batches."""
    if schedule == "DualPipeV":
        return micro_batches >= 2 * ranks
    if schedule in IN_ROUNDS:
        return micro_batches > 1 and micro_batches % max(1, micro_batches // ranks) == 0
    return micro_batches > 1


def _wants(schedule: str, ranks: int, found: int) -> str:
    if schedule == "DualPipeV":
        return f"wants one for each of the {2 * ranks} stages"
    if found == 1:
        return "wants 2 or more"
    return f"goes through them in {found // ranks} rounds, which must be equal"
