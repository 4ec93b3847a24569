"""Tensor and sequence parallelism: heads, channels and vocabulary over ranks, and the sequence between layers.

Between modules each rank has a part of the sequence, so what lies there (norms, residuals) is computed once:

    embedding      every rank looks all tokens up in its entries; reduce-scatter            -> tokens / tp
    `starts`       a module behind the embedding that needs all tokens: all-reduce before, cut behind
    `gathers`      attention, MLP: all-gather; columns, heads, rows; reduce-scatter         -> tokens / tp
    end            all-gather before the head, whose loss is parallel over the vocabulary

Parameters that no plan names are whole on every rank and see a part of the sequence or of the heads, so their gradients
are partial sums everywhere: they are added up over the tensor ranks once a step, all together. Experts are left alone:
they are cut by expert parallelism. An indexer is whole on every rank, and each takes an equal share of its loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovl.config.schema import Job, Parallelism
from nanovl.mesh import Mesh
from nanovl.models.blocks.head import Head
from nanovl.models.blocks.norm import RMSNorm
from nanovl.models.blocks.sparse_core import index_losses
from nanovl.parallelisms.collectives import gather, piece
from nanovl.parallelisms.local_views import Memo, View, Views, read_before, spread
from nanovl.parallelisms.tensor_modules import (
    SEQUENCE,
    OverRanks,
    RowLinear,
    SumOfHeads,
    VocabEmbedding,
    VocabHead,
    WidthNorm,
)
from nanovl.spec import Cut, Model, TensorPlan, expert_layers

CUT_DIMS: dict[tuple[str, type[nn.Module]], dict[str, int]] = {
    ("column", nn.Linear): {"weight": 0, "bias": 0},
    ("column", nn.Embedding): {"weight": 1},
    ("row", nn.Linear): {"weight": 1},
    ("vocab", nn.Embedding): {"weight": 0},
    ("vocab", Head): {"weight": 0},
    ("width", RMSNorm): {"weight": 0},
}
"""Which dimension of which parameter a cut of a child goes through."""
CUT_CLASSES: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {
    ("row", nn.Linear): RowLinear,
    ("vocab", nn.Embedding): VocabEmbedding,
    ("vocab", Head): VocabHead,
    ("width", RMSNorm): WidthNorm,
}


Plans = list[tuple[str, nn.Module, TensorPlan]]
"""Path, module and plan of all modules that have one."""


class NamedCut(NamedTuple):
    """One line of a module's plan."""

    path: str
    """Of the module."""
    module: nn.Module
    name: str
    """Of its child or parameter."""
    cut: Cut


def apply_tensor_parallel(model: Model, config: Parallelism, mesh: Mesh) -> int:
    """Cut what the modules' plans name, in place; returns the number of modules cut."""
    axis, group = mesh.axis("tp"), mesh.group("tp")
    if axis is None or group is None:
        return 0
    if config.enable_async_tensor_parallel:
        _overlap_transfers()
    plans = _plans(model)
    chosen: dict[nn.Module, Views] = {}
    for named in _named_cuts(plans):
        target = getattr(named.module, named.name)
        if isinstance(target, nn.Module):
            kind = _kind(named.cut, target)
            target.__class__ = CUT_CLASSES.get(kind, type(target))
            chosen[target] = {name: _view(named.cut, dim, group) for name, dim in CUT_DIMS[kind].items()}
        else:
            chosen.setdefault(named.module, {})[named.name] = _view(named.cut, 0, group)
    for module in model.modules():
        if isinstance(module, OverRanks):
            module.tp = group
        if isinstance(module, VocabEmbedding):
            module.cuts_sequence = not any(plan.starts for _, _, plan in plans)
    for loss in index_losses(model):
        loss.all_heads, loss.share = SumOfHeads(group), 1 / group.size()
    memo: Memo = {}
    seen = {m for layer in expert_layers(model) for m in layer.experts.modules()}
    for unit in (*model.blocks(), model):
        modules = [m for m in unit.modules() if m not in seen]
        read_before(unit, [(m, spread(m, chosen.get(m, {}), axis, memo)) for m in modules])
        seen.update(modules)
    _change_regions(model, plans, group)
    return len(chosen)


def mistakes(model: Model, job: Job, device: torch.device) -> list[str]:
    """Why this model cannot be cut as asked, one line each."""
    wrong = _async_mistakes(job, device)
    tp = job.parallelism.tensor_parallel_degree
    if tp == 1:
        return wrong
    named_cuts = list(_named_cuts(_plans(model)))
    unfit: dict[tuple[int, str], list[str]] = {}
    for path, _, name, cut in named_cuts:
        if not _fits(cut, tp):
            folded = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", f"{path}.{name}".lstrip("."))
            hint = f", or make the vocabulary a multiple of {tp}" if cut.kind == "vocab" else ""
            names = unfit.setdefault((cut.units, hint), [])
            names += [folded] if folded not in names else []
    length, cuts = job.training.seq_len, {named.cut for named in named_cuts}
    works = [d for d in range(1, length + 1) if length % d == 0 and all(_fits(cut, d) for cut in cuts)]
    near = " or ".join(map(str, sorted(sorted(works, key=lambda d: abs(d - tp))[:2])))
    return wrong + [
        f"parallelism.tensor_parallel_degree = {tp}: {', '.join(names)}: {units} parts cannot be shared by {tp} ranks; "
        f"use {near}{hint}"
        for (units, hint), names in unfit.items()
    ]


def _fits(cut: Cut, ranks: int) -> bool:
    """Each rank has as many units as the others, or, of what can be computed twice, one."""
    may_repeat = cut.kind not in ("row", "vocab")
    return cut.units % ranks == 0 or (may_repeat and ranks % cut.units == 0)


def _async_mistakes(job: Job, device: torch.device) -> list[str]:
    config = job.parallelism
    if not config.enable_async_tensor_parallel:
        return []
    tp = config.tensor_parallel_degree
    reasons = {
        "there are no transfers with tensor_parallel_degree = 1; raise it": tp == 1,
        "the compiler does the overlapping; set compile.enable = on": job.compile.enable == "off",
        f"it needs memory that GPUs share, and this is a {device.type.upper()}": device.type != "cuda",
    }
    return [
        f"parallelism.enable_async_tensor_parallel = true: {reason}, or leave it out"
        for reason, holds in reasons.items()
        if holds
    ]


def _overlap_transfers() -> None:
    """Let the compiler run gathers and reduce-scatters together with the products beside them.

    The one switch that torchtitan 0.2.2 sets as well; torch no longer wants symmetric memory announced by group. Never
    run, for want of two GPUs.
    """
    import torch._inductor.config

    torch._inductor.config._micro_pipeline_tp = True


def _plans(model: nn.Module) -> Plans:
    return [(path, m, m.tensor_plan()) for path, m in model.named_modules() if hasattr(m, "tensor_plan")]


def _named_cuts(plans: Plans) -> Iterator[NamedCut]:
    """All cuts of children and parameters that this part of the model has."""
    for path, module, plan in plans:
        for name, cut in plan.cuts.items():
            if getattr(module, name, None) is not None:
                yield NamedCut(path, module, name, cut)


def _kind(cut: Cut, target: nn.Module) -> tuple[str, type[nn.Module]]:
    found = [kind for kind in CUT_DIMS if kind[0] == cut.kind and isinstance(target, kind[1])]
    assert len(found) == 1, f"no way to cut a {type(target).__name__} as a {cut.kind}"
    return found[0]


def _view(cut: Cut, dim: int, group: dist.ProcessGroup) -> View:
    """A part of each rank's own, or one unit of a whole that several ranks read."""
    if cut.units % group.size() == 0:
        return View(shard_dim=dim)
    return View(dim=dim, piece=group.rank() * cut.units // group.size(), pieces=cut.units)


def _change_regions(model: Model, plans: Plans, group: dist.ProcessGroup) -> None:
    """Gather and cut the sequence where modules want it, and before the head."""

    def gather_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather(args[0], SEQUENCE, group), *args[1:]

    def keep_piece(module: nn.Module, args: tuple[Any, ...], whole: Tensor) -> Tensor:
        return piece(whole, SEQUENCE, group)

    for _, module, plan in plans:
        if plan.gathers:
            module.register_forward_pre_hook(gather_first)
        if plan.starts:
            module.register_forward_hook(keep_piece)
    model.whole_rows = partial(gather, dim=SEQUENCE, group=group)  # type: ignore[method-assign]
