"""Context parallelism: every row's tokens are shared out over ranks, and attention sees them all.

A model is built for whole rows; what looks at other tokens is replaced: every attention layer's core, the model's
masks, and nanochat's look at the previous token. All else works on one token at a time and does not know.
"""

from __future__ import annotations

from typing import Any

from nanovl.config.schema import Job, Parallelism
from nanovl.mesh import Mesh
from nanovl.models.blocks.attention import AttentionCore, MetaBuilder
from nanovl.models.blocks.sparse_core import SparseCore
from nanovl.models.nanochat import PreviousToken
from nanovl.parallelisms.context_cores import (
    AllGatherCore,
    AllGatherMeta,
    AllGatherSparseCore,
    CutCore,
    CutMeta,
    PreviousAcrossCut,
    UlyssesCore,
    UlyssesMeta,
)
from nanovl.parallelisms.context_cut import SequenceCut
from nanovl.parallelisms.context_ring import RingCore, RingMetaBuilder
from nanovl.spec import Model

METHODS: dict[str, tuple[type[CutCore], type[CutMeta]]] = {
    "allgather": (AllGatherCore, AllGatherMeta),
    "ring": (RingCore, RingMetaBuilder),
    "ulysses": (UlyssesCore, UlyssesMeta),
}


def sequence_cut(config: Parallelism, mesh: Mesh) -> SequenceCut:
    """How the job cuts rows, on this rank."""
    # a rank of ulysses attends with whole rows, so the work is even, and one chunk a rank keeps them in order
    headtail = (
        config.context_parallel_load_balancer == "headtail" and config.context_parallel_method != "ulysses"
    )
    return SequenceCut(mesh.rank("cp"), mesh.size("cp"), headtail)


def mistakes(model: Model, job: Job) -> list[str]:
    """Why this model cannot run in context parallel as asked, one line each."""
    config = job.parallelism
    if config.context_parallel_degree == 1:
        return []
    wrong = []
    blind = [
        index
        for index, block in model.layers.items()
        if not any(isinstance(m, AttentionCore) for m in block.modules())
    ]
    if blind:
        which = f"layer {blind[0]} mixes" if len(blind) == 1 else f"layers {', '.join(blind)} mix"
        wrong.append(
            f"parallelism.context_parallel_degree = {config.context_parallel_degree}: {which} tokens without "
            "an attention core, and would see this rank's tokens only; set it to 1"
        )
    mixers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "core", None), AttentionCore)]
    if config.context_parallel_method != "allgather" and any(isinstance(m.core, SparseCore) for m in mixers):
        wrong.append(
            f"parallelism.context_parallel_method = {config.context_parallel_method!r}: an indexer chooses among "
            "all keys of a row, by all heads alike; use 'allgather'"
        )
    elif config.context_parallel_method == "ulysses":
        for heads in sorted({m.config.num_attention_heads for m in mixers}):
            wrong += _heads(heads, config)
    kernels = {m.core.scores.kernel for m in mixers}
    if "varlen" in kernels:
        wrong.append(
            "model: kernel = 'varlen' makes no masks, by which parallelism.context_parallel_degree cuts rows; leave "
            "the kernel 'auto'"
        )
    if config.context_parallel_method == "ring":
        kernels -= {"auto", "varlen"}
        wrong += [
            f"model: kernel = {kernel!r} is not used by parallelism.context_parallel_method = 'ring', which multiplies "
            "for itself; leave the kernel 'auto'"
            for kernel in sorted(kernels)
        ]
    return wrong


def _heads(heads: int, config: Parallelism) -> list[str]:
    degree, tensor_degree = config.context_parallel_degree, config.tensor_parallel_degree
    local = heads // tensor_degree  # tensor.py says so where that is not even
    if local < 1 or local % degree == 0:
        return []
    shared = f" ({heads} over tensor_parallel_degree = {tensor_degree})" if tensor_degree > 1 else ""
    fitting = [d for d in range(2, local + 1) if local % d == 0]
    near = min(fitting, key=lambda d: abs(d - degree), default=None)
    return [
        f"parallelism.context_parallel_degree = {degree}: ulysses shares out attention heads, and {degree} does not "
        f"divide a rank's {local}{shared}; use {f'{near}, or ' if near else ''}"
        "context_parallel_method = 'allgather' or 'ring'"
    ]


def apply_context_parallel(model: Model, config: Parallelism, mesh: Mesh) -> int:
    """Make the model see other ranks' tokens; returns the number of attention layers changed."""
    group = mesh.group("cp")
    if group is None:
        return 0
    cut = sequence_cut(config, mesh)
    core, meta = METHODS[config.context_parallel_method]
    changed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AttentionCore):
                cut_core = AllGatherSparseCore if isinstance(child, SparseCore) else core
                setattr(module, name, cut_core(child, cut, group))
                changed += 1
            elif isinstance(child, PreviousToken):
                setattr(module, name, PreviousAcrossCut(cut, group))
    assert isinstance(model.meta, MetaBuilder)
    model.meta = meta(model.meta, cut, group)
    return changed
