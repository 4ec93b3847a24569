"""Expert parallelism: a layer's experts live on different ranks, and tokens travel to them.

Experts are cut over ep, and with expert tensor parallelism their channels over etp; each rank's piece is sharded by
FSDP over the ranks that are left (mesh.py: `sparse`). Tensor parallelism itself leaves experts alone: each tensor rank
sends the tokens of its own piece of the sequence, so experts are apart from other parameters with tp > 1 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import _disable_current_modes

from nanovl.config.schema import Job, Parallelism
from nanovl.dist import all_reduce
from nanovl.mesh import Mesh
from nanovl.parallelisms.expert_dispatch import ExpertDispatch
from nanovl.spec import ExpertLayer, Model, expert_layers, serving_modules

# B rows, E experts


def mistakes(model: Model, job: Job) -> list[str]:
    """Why this model's experts cannot be shared as asked, one line each."""
    config, layers = job.parallelism, expert_layers(model)
    wrong = []
    channels = {
        p.shape[_channel_dim(layer, n)] for layer in layers for n, p in layer.experts.named_parameters()
    }
    for key, name, counts in (
        ("expert_parallel_degree", "experts", {layer.num_experts for layer in layers}),
        ("expert_tensor_parallel_degree", "channels of an expert", channels),
    ):
        degree = getattr(config, key)
        if degree == 1:
            continue
        if not layers:
            wrong.append(f"parallelism.{key} = {degree}: {job.model.name} has no experts; set it to 1")
        wrong += [
            f"parallelism.{key} = {degree} does not divide the {count} {name}; use {_nearest(degree, count)}"
            for count in sorted(counts)
            if count % degree
        ]
    return wrong


def apply_expert_parallel(model: Model, config: Parallelism, mesh: Mesh) -> int:
    """Give each rank its experts, in place; returns the number of layers changed."""
    layers = expert_layers(model)
    for layer in layers:
        groups = [group for group in (mesh.group("cp"), mesh.group("tp")) if group is not None]
        if groups:
            layer.router.whole_rows = SumOverRanks(groups)
        if mesh.size("ep") > 1 or mesh.size("etp") > 1:
            _distribute(layer, mesh)
            layer.dispatch = ExpertDispatch(layer.dispatch, mesh.group("ep"), mesh.group("etp"))
            layer.experts.forward = partial(_compute_locally, layer, mesh.rank("etp"))
    return len(layers) if mesh.size("ep") > 1 or mesh.size("etp") > 1 else 0


class SumOverRanks(nn.Module):
    """Counts of a rank's tokens of each row -> those of the whole row, whose other tokens are on other ranks."""

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, counts_BE: Tensor) -> Tensor:
        total_BE = counts_BE.clone()
        for group in self.groups:
            all_reduce(total_BE, group=group)
        return total_BE


def expert_modules(block: nn.Module, mesh: Mesh) -> list[nn.Module]:
    """The experts of a block that are units of FSDP on `mesh.experts`, because their ranks are not the others'."""
    apart = mesh.size("ep") > 1 or mesh.size("tp") > 1
    return [layer.experts for layer in expert_layers(block)] if apart else []


def expert_placement(model: Model, mesh: Mesh) -> Callable[[nn.Parameter], Shard | None]:
    """How FSDP cuts parameters: by the first dimension, but experts that are fewer than ranks by the second.

    FSDP cuts that one only into equal pieces, and not where etp has cut it already; there some ranks hold no expert.
    """
    ranks, by_channels = mesh.size("efsdp"), set()
    for layer in expert_layers(model):
        for parameter in layer.experts.parameters():
            few = parameter.shape[0] < ranks * mesh.size("ep")
            if few and parameter.shape[1] % ranks == 0 and mesh.size("etp") == 1:
                by_channels.add(parameter)
    return lambda parameter: Shard(1) if parameter in by_channels else None


def hide_gathering(experts: nn.Module) -> None:
    """Keep what FSDP does for a block's experts from whoever watches the block's operations.

    Selective checkpointing does, and expects a recomputed forward to repeat them; but FSDP gathers weights only where
    they are not there yet. To be called after fully_shard.
    """

    def unwatched(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return hook(*args, **kwargs)

        return run

    for hooks in (experts._forward_pre_hooks, experts._forward_hooks):
        for key, hook in hooks.items():
            hooks[key] = unwatched(hook)


def prefetch_around_experts(model: Model) -> None:
    """Name what FSDP gathers ahead, block by block: the host waits for the sizes of a dispatch, and FSDP's own guess
    comes only after that."""
    units: list[list[Any]] = [
        [block, *(m for m in block.modules() if m is not block and isinstance(m, FSDPModule))]
        for block in model.blocks()
    ]
    served = set(serving_modules(model))
    for here, following in pairwise(units):
        if following[0] in served:  # evaluation would gather the others in vain, and leave them so
            here[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(here)


def _distribute(layer: ExpertLayer, mesh: Mesh) -> None:
    axes = [axis for axis in ("ep", "etp") if mesh.dims._meshes[axis].size() > 1]
    ranks = mesh.dims.get_mesh(axes)
    for name, parameter in list(layer.experts.named_parameters(recurse=False)):
        placements = [Shard(0 if axis == "ep" else _channel_dim(layer, name)) for axis in axes]
        piece = distribute_tensor(parameter.detach(), ranks, placements, src_data_rank=None)
        setattr(layer.experts, name, nn.Parameter(piece, requires_grad=parameter.requires_grad))


def _channel_dim(layer: ExpertLayer, name: str) -> int:
    """Which dimension of a parameter of experts etp cuts: the inner one, or the only one of a bias of the output."""
    return layer.inner_dims.get(name, 1)


def _compute_locally(layer: ExpertLayer, cut: int, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """With this rank's experts, and of their channels with part number `cut`.

    The ranks' outputs will be added up. So each adds its own channels of the output's bias, and zeros elsewhere.
    """
    weights = {}
    for name, parameter in layer.experts.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if name not in layer.inner_dims:
            before, size = cut * local.shape[1], parameter.shape[1]
            local = F.pad(local, (before, size - before - local.shape[1]))
        weights[name] = local
    out_RD: Tensor = layer.experts.compute(x_RD, counts_E, weights)
    return out_RD


def _nearest(number: int, of: int) -> str:
    divisors = sorted((d for d in range(1, of + 1) if of % d == 0), key=lambda d: abs(d - number))
    return " or ".join(map(str, sorted(divisors[:2])))
