"""Every mesh that is compared with one rank: the default run takes COVERING, `-m slow` and docs/parity.md take all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meshes import job_of

from nanovl.config.schema import Job

SCHEDULES = [
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    mesh: str
    model: str
    world: int
    fields: dict[str, Any] = field(default_factory=dict)
    """Of [parallelism]."""

    def job(self) -> Job:
        """16 micro-batches of one row over the data ranks, enough for every schedule."""
        return job_of(self.model, rows=16, local=1, **self.fields)

    def __str__(self) -> str:
        return f"{self.model}: {self.mesh}"


def degrees(
    *,
    copies: int = 1,
    shard: int = 1,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    **more: Any,
) -> tuple[int, dict[str, Any]]:
    """Ranks and [parallelism] fields."""
    return copies * shard * tp * pp * cp, {
        "data_parallel_replicate_degree": copies,
        "tensor_parallel_degree": tp,
        "pipeline_parallel_degree": pp,
        "context_parallel_degree": cp,
        "expert_parallel_degree": ep,
        "expert_tensor_parallel_degree": etp,
        **more,
    }


def method(kind: str, balancer: str = "headtail") -> dict[str, str]:
    return {"context_parallel_method": kind, "context_parallel_load_balancer": balancer}


def schedule(name: str) -> dict[str, str]:
    return {"pipeline_parallel_schedule": name}


EVERY = {
    "ddp 2": degrees(copies=2),
    "fsdp 4": degrees(shard=4),
    "hsdp 2 x 2": degrees(copies=2, shard=2),
    "tp 2": degrees(tp=2),
    "tp 2, fsdp 2": degrees(tp=2, shard=2),
    "tp 2, hsdp 2 x 2": degrees(tp=2, shard=2, copies=2),
    **{f"pp 2 {name}": degrees(pp=2, **schedule(name)) for name in SCHEDULES},
    **{f"pp 2 {name}, fsdp 2": degrees(pp=2, shard=2, **schedule(name)) for name in SCHEDULES},
    **{f"cp 2 {kind}": degrees(cp=2, **method(kind)) for kind in ("allgather", "ring", "ulysses")},
    "cp 2 allgather, no balancing": degrees(cp=2, **method("allgather", "none")),
    "cp 2, fsdp 2": degrees(cp=2, shard=2),
    "cp 2, tp 2": degrees(cp=2, tp=2),
    "cp 2 ring, tp 2, fsdp 2": degrees(cp=2, tp=2, shard=2, **method("ring")),
    "pp 2, tp 2": degrees(pp=2, tp=2),
    "pp 2, cp 2": degrees(pp=2, cp=2),
    "pp 2, tp 2, fsdp 2": degrees(pp=2, tp=2, shard=2),
    "pp 2 ZBVZeroBubble, tp 2, fsdp 2": degrees(pp=2, tp=2, shard=2, **schedule("ZBVZeroBubble")),
    "pp 2, tp 2, cp 2": degrees(pp=2, tp=2, cp=2),
}
"""For every model."""
EXPERTS = {
    "ep 2": degrees(ep=2, shard=2),
    "ep 2, fsdp 2": degrees(ep=2, shard=4),
    "ep 2, hsdp 2 x 2": degrees(ep=2, shard=2, copies=2),
    "ep 4": degrees(ep=4, shard=4),
    "ep 2, tp 2": degrees(ep=2, tp=2),
    "ep 2, tp 2, fsdp 2": degrees(ep=2, tp=2, shard=2),
    "ep 2, etp 2, fsdp 2": degrees(ep=2, tp=2, etp=2, shard=2),
    "ep 2, cp 2": degrees(ep=2, cp=2),
    "pp 2, ep 2": degrees(pp=2, ep=2, shard=2),
    "pp 2, ep 2, fsdp 2": degrees(pp=2, ep=2, shard=4),
    "pp 2, ep 2, tp 2": degrees(pp=2, ep=2, tp=2),
}
"""For the models with experts."""

LATENT = [
    "tp 2",
    "tp 2, fsdp 2",
    "pp 2 1F1B",
    "pp 2 ZBVZeroBubble",
    "cp 2 allgather",
    "cp 2 ring",
    "cp 2 ulysses",
    "cp 2, tp 2",
    "cp 2 ring, tp 2, fsdp 2",
    "pp 2, tp 2",
    "pp 2, tp 2, cp 2",
]
"""For latent attention: those that cut its heads, its sequence or the model."""

MATRIX = [
    *(Case(name, model, *mesh) for model in ("qwen3", "nanochat", "moe") for name, mesh in EVERY.items()),
    *(
        Case(name, "qwen3 tied", *EVERY[name])
        for name in ("tp 2, fsdp 2", "pp 2 1F1B", "pp 2 ZBVZeroBubble, fsdp 2")
    ),
    *(
        Case(name, "qwen3 muon", *EVERY[name])
        for name in ("hsdp 2 x 2", "tp 2, fsdp 2", "pp 2, tp 2, fsdp 2")
    ),
    *(
        Case(name, model, *mesh)
        for model in ("moe", "moe sigmoid", "deepseek_v3")
        for name, mesh in EXPERTS.items()
    ),
    *(Case(name, "deepseek_v3", *EVERY[name]) for name in LATENT),
]
COVERING = [
    ("qwen3", "pp 2, tp 2, fsdp 2"),
    ("qwen3", "cp 2 ring, tp 2, fsdp 2"),
    ("qwen3 muon", "tp 2, fsdp 2"),
    ("nanochat", "tp 2, fsdp 2"),
    ("nanochat", "pp 2 Interleaved1F1B, fsdp 2"),
    ("nanochat", "cp 2, tp 2"),
    ("moe", "pp 2, ep 2, fsdp 2"),
    ("moe", "pp 2 ZBVZeroBubble"),
    ("moe sigmoid", "ep 2, tp 2"),
    ("moe sigmoid", "ep 2, cp 2"),
    ("deepseek_v3", "ep 2, tp 2"),
    ("deepseek_v3", "cp 2 ulysses"),
]
"""Every axis, every pair of axes that meet somewhere, both optimizers."""
