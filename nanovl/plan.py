"""`nanovl plan`: memory, traffic, time and cost of a job on any number of GPUs, found out on this machine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanovl.config_tools import parse_job_flags
from nanovl.errors import ConfigError
from nanovl.log import out, table

if TYPE_CHECKING:
    from nanovl.planning.estimate import Plan

OPTIONS = {
    "--world-size=N": "ranks, one a GPU; 1 without it",
    "--gpu=NAME": "h100, h100-pcie, h200, h200-nvl, b200, a100, a100-40gb, a100-pcie, l40s, rtx4090, rtx5090, or as "
    "torch reports it; h100 without it",
    "--gpus-per-node=N": "GPUs that reach each other by NVLink or PCIe; 8 without it",
    "--network=GB": "network of one GPU, GB/s in one direction; that of the vendor's node without it",
    "--mfu-ceiling=SHARE": "share of the GPU's peak that products reach when nothing waits; assumed 0.5 without it",
    "--price=X": "of one GPU for an hour; no cost is told without it",
    "--json": "the numbers as JSON",
}
PURPOSES = {
    "sharding": "weights, gradients",
    "layers": "inside layers",
    "stages": "between stages",
    "update": "norm, update",
}
NAMES = {
    "gathered": "gathered weights",
    "activations": "activations kept",
    "working": "working memory",
    "passes": "at most in forward and backward",
    "update": "inside the update",
}
REMEDIES = {
    "parameters": "more parallelism.data_parallel_shard_degree or tensor_parallel_degree",
    "gradients": "more parallelism.data_parallel_shard_degree or tensor_parallel_degree",
    "optimizer": "more parallelism.data_parallel_shard_degree or tensor_parallel_degree",
    "gathered": 'parallelism.fsdp_reshard_after_forward = "always", or more tensor_parallel_degree',
    "activations": 'activation_checkpoint.mode = "full", or a smaller training.local_batch_size',
    "working": "a smaller training.loss_chunk_tokens or local_batch_size",
    "update": "more parallelism.data_parallel_shard_degree",
}
"""What makes each part of memory smaller."""
GIB = 2**30


def main(argv: list[str]) -> int:
    """`nanovl plan --config FILE [...] [--world-size=N] [--gpu=NAME] [--price=X] [--json] [--section.key=value]`."""
    asked = parse_job_flags(argv, "plan", OPTIONS)
    given = asked.switches
    world_size = int(_number(given, "--world-size", "1", whole=True))
    gpus_per_node = int(_number(given, "--gpus-per-node", "8", whole=True))
    ceiling = _number(given, "--mfu-ceiling", "0.5", most=1.0)
    price = _number(given, "--price", "nan") if "--price" in given else None

    from nanovl.planning.estimate import plan, question
    from nanovl.planning.hardware import gpu_called
    from nanovl.registry import read_job

    gpu = gpu_called(given.get("--gpu", "h100"))
    if "--network" in given:
        gpu = dataclasses.replace(gpu, network_rate=1e9 * _number(given, "--network", ""))
    job = read_job(asked.files, asked.flags, world_size=world_size)
    found = plan(question(job, world_size, gpu), gpu, ceiling, gpus_per_node)
    if "--json" in given:
        out(json.dumps(as_numbers(found, price), indent=2))
    else:
        out("\n".join(as_text(found, price, ceiling, gpus_per_node)))
    return 0


def as_text(plan: Plan, price: float | None, ceiling: float, gpus_per_node: int) -> list[str]:
    """The plan as blocks of lines."""
    from nanovl.planning.hardware import LINK_EFFICIENCY, USABLE_MEMORY
    from nanovl.report.facts import parameter_counts

    asked, times = plan.asked, plan.times
    training, spec = asked.job.training, asked.spec
    rows = training.local_batch_size or training.global_batch_size // _data_degree(plan)
    lines = [
        f"nanovl plan  {spec.family.name} {spec.flavor}  {parameter_counts(spec)[0]:,} parameters",
        f"  step      {training.global_batch_size:,} rows of {training.seq_len:,} = {plan.tokens:,} tokens; "
        f"micro-batches of {rows} rows, {plan.ranks[0].micro_batches} on each rank; {training.steps:,} steps",
        f"  GPUs      {asked.world_size:,} x {plan.gpu.name}, {gpus_per_node} a node: "
        f"{plan.gpu.flops / 1e12:.0f} TFLOP/s, {plan.gpu.memory_gib:.0f} GiB, "
        f"{plan.gpu.link_rate / 1e9:.0f} GB/s in the node, {plan.gpu.network_rate / 1e9:.0f} GB/s between nodes",
        "",
        *_memory(plan),
        "",
        table(
            ["traffic of rank 0, a step", "axis", "ranks", "collective", "calls", "MiB", "seconds"],
            _traffic_rows(plan, gpus_per_node),
        ),
        "",
        table(["time of a step", "seconds"], _time_rows(plan)),
        "",
        f"  arithmetic {plan.flops:.3g} FLOPs a step, and {plan.recomputed_flops:.3g} recomputed",
        f"  speed      {plan.tokens / times.step:,.0f} tokens/s, mfu {100 * plan.mfu:.1f}%, "
        f"{_hours(plan):,.1f} hours for {training.steps:,} steps",
    ]
    if price is not None:
        lines.append(f"  cost       {_cost_line(plan, price)}")
    lines += [
        "",
        f"  assumed: products reach {ceiling:g} of the peak, collectives {LINK_EFFICIENCY:g} of a link, tensors may "
        f"fill {USABLE_MEMORY:g} of memory;",
        "  FSDP's traffic overlaps with everything else in forward and backward, transfers between stages are hidden,",
        "  all other traffic waits; rows are one document; experts are balanced. Activations are those of eager mode:",
        "  torch.compile keeps fewer. Host, data, checkpoints, evaluation and the latency of collectives take no time.",
    ]
    return lines


def as_numbers(plan: Plan, price: float | None) -> dict[str, Any]:
    """The plan as one JSON object: bytes, seconds, FLOPs."""
    times = {**dataclasses.asdict(plan.times), "step": plan.times.step}
    numbers: dict[str, Any] = {
        "world_size": plan.asked.world_size,
        "gpu": dataclasses.asdict(plan.gpu),
        "fits": plan.fits,
        "tokens_per_step": plan.tokens,
        "steps": plan.asked.job.training.steps,
        "flops_per_step": plan.flops,
        "recomputed_flops_per_step": plan.recomputed_flops,
        "bubble": plan.bubble,
        "seconds": times,
        "tokens_per_second": plan.tokens / plan.times.step,
        "mfu": plan.mfu,
        "ranks": [
            {
                "rank": rank.rank,
                "layers": rank.layers,
                "on_gpu": plan.bytes_of(rank),
                "memory": dataclasses.asdict(rank.memory),
                "logits": rank.logits,
                "in_flight": rank.in_flight,
                "traffic": [
                    {
                        "why": why,
                        "axis": axis,
                        "collective": what,
                        "calls": t.calls[axis, what],
                        "bytes": size,
                    }
                    for why, t in rank.traffic.items()
                    for (axis, what), size in sorted(t.bytes.items())
                ],
            }
            for rank in plan.ranks
        ],
    }
    if price is not None:
        numbers["cost_of_run"] = price * _gpu_hours(plan)
    return numbers


def _memory(plan: Plan) -> list[str]:
    shown = [plan.ranks[0]] if plan.worst is plan.ranks[0] else [plan.ranks[0], plan.worst]
    host = {"parameters", "gradients", "optimizer"} if plan.offloaded else set()
    rows: list[list[object]] = []
    for part in dataclasses.fields(shown[0].memory):
        name = NAMES.get(part.name, part.name) + (" (in host memory)" if part.name in host else "")
        rows.append([name, *(f"{getattr(rank.memory, part.name) / GIB:.2f}" for rank in shown)])
        if part.name == "working":
            rows.append(["  in the loss", *(f"{rank.logits / GIB:.2f}" for rank in shown)])
    rows.append(["most on the GPU", *(f"{plan.bytes_of(rank) / GIB:.2f}" for rank in shown)])
    titles = [f"rank {rank.rank} (layers {_ranges(rank.layers)})" for rank in shown]
    return [table(["memory, GiB", *titles], rows), *_verdict(plan, host)]


def _verdict(plan: Plan, host: set[str]) -> list[str]:
    worst = plan.worst
    lines = [
        f"  {'fits' if plan.fits else 'DOES NOT FIT'}: {plan.bytes_of(worst) / GIB:.1f} GiB on rank {worst.rank}; "
        f"{plan.usable_bytes / GIB:.1f} of {plan.gpu.memory_gib:.0f} are usable"
    ]
    if not plan.fits:
        parts = dataclasses.asdict(worst.memory)
        in_update = worst.memory.passes < plan.bytes_of(worst) and not plan.offloaded
        counted = REMEDIES.keys() - host - {"activations" if in_update else "update"}
        most = max(counted, key=lambda name: parts[name])
        lines.append(f"  the most are {NAMES.get(most, most)}; {REMEDIES[most]} makes them fewer")
        if plan.asked.modes.compile and most == "activations":
            lines.append("  they are those of eager mode, and torch.compile keeps fewer: it may still fit")
    return lines


def _traffic_rows(plan: Plan, gpus_per_node: int) -> list[list[object]]:
    from nanovl.planning.hardware import seconds

    rank = plan.ranks[0]
    return [
        [
            PURPOSES[why],
            axis,
            len(rank.members[axis]),
            what,
            round(traffic.calls[axis, what]),
            f"{size / 2**20:,.1f}",
            f"{seconds(what, size, rank.members[axis], plan.gpu, gpus_per_node):.4f}",
        ]
        for why, traffic in rank.traffic.items()
        for (axis, what), size in sorted(traffic.bytes.items())
    ]


def _time_rows(plan: Plan) -> list[list[object]]:
    times, bubble = plan.times, f" (bubble {100 * plan.bubble:.0f}%)" if plan.bubble else ""
    hidden = (
        "hidden" if times.sharding < times.products + times.inside_layers + times.waiting else "not hidden"
    )
    rows = {
        "products": times.products,
        "traffic inside layers": times.inside_layers,
        f"waiting in the pipeline{bubble}": times.waiting,
        f"weights and gradients of FSDP ({hidden})": times.sharding,
        "norm and update: traffic, products": times.update,
        "update: memory": times.memory,
        "step": times.step,
    }
    return [[name, f"{value:.4f}"] for name, value in rows.items()]


def _cost_line(plan: Plan, price: float) -> str:
    total = price * _gpu_hours(plan)
    tokens = plan.tokens * plan.asked.job.training.steps
    return f"{total:,.2f} at {price:g} a GPU-hour: {1e9 * total / tokens:,.2f} for a billion tokens"


def _hours(plan: Plan) -> float:
    return plan.times.step * plan.asked.job.training.steps / 3600


def _gpu_hours(plan: Plan) -> float:
    return _hours(plan) * plan.asked.world_size


def _data_degree(plan: Plan) -> int:
    from nanovl.config.check import data_parallel_degree

    return data_parallel_degree(plan.asked.job, plan.asked.world_size)


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 12-15."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


def _number(
    given: dict[str, str], name: str, default: str, *, whole: bool = False, most: float = math.inf
) -> float:
    text = given.get(name, default)
    try:
        value = float(int(text)) if whole else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most or math.isinf(value):
        wanted = f"a {'whole ' if whole else ''}number above 0" + (
            f", {most:g} at most" if most < math.inf else ""
        )
        raise ConfigError(f"{name} = {text!r}: wants {wanted}")
    return value
