"""Parameters that are DTensors for FSDP, optimizers and checkpoints, and plain tensors for a module's forward.

Operations on DTensors cost more time than small matrices take, and compiled graphs that receive DTensors fail where
they are recomputed (torch 2.13). So before a block runs, and outside of its graph, each parameter that FSDP has
gathered is read once as this rank's part; and the module's class is exchanged, as FSDP does too, for one that finds
that part under the parameter's name. The parameters themselves stay in `module._parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nanovl.dist import all_reduce


class View(NamedTuple):
    """How a parameter is kept over the ranks of an axis, and what a rank reads of it."""

    shard_dim: int | None = None
    """Each rank keeps its part along it, and reads that; None = each keeps all, and gradients are summed."""
    dim: int = 0
    """Of what is kept whole, a rank reads piece number `piece` of `pieces` along it."""
    piece: int = 0
    pieces: int = 1

    def of(self, parameter: Any) -> Tensor:
        """What this rank reads of the gathered parameter."""
        if self.shard_dim is not None:
            return parameter.to_local()
        # its gradient is a partial sum; called whole it costs no all-reduce now, and `sum_copies` makes it true
        local = parameter.to_local(grad_placements=[Replicate()])
        if self.pieces == 1:
            return local
        size = local.shape[self.dim] // self.pieces
        return local.narrow(self.dim, self.piece * size, size)


Views = dict[str, View]
"""By name of a module's own parameter."""
Memo = dict[int, nn.Parameter]
"""By id of the parameters there were, those that took their place: a tied one is made once."""


def spread(module: Any, chosen: Mapping[str, View], mesh: DeviceMesh, memo: Memo) -> Views:
    """Make every own parameter of `module` a DTensor over `mesh`, whole where `chosen` does not name it.

    Returns the view of each.
    """
    views: Views = {}
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        view = views[name] = chosen.get(name, View())
        if id(parameter) not in memo:
            placement = Replicate() if view.shard_dim is None else Shard(view.shard_dim)
            cut = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            memo[id(parameter)] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
        module.register_parameter(name, memo[id(parameter)])
    if views:
        module.local_parameters = {}
        module.__class__ = _class_of(module.__class__, tuple(views))
    return views


def read_before(unit: nn.Module, modules: Iterable[tuple[nn.Module, Views]]) -> None:
    """Have `unit`, whose parameters FSDP gathers together, read those of `modules` before each forward."""
    every: list[tuple[Any, Views]] = [(module, views) for module, views in modules if views]

    def read(*_: Any) -> None:
        for module, views in every:
            # kept until the next forward: recomputation in backward finds FSDP's memory filled again
            module.local_parameters = {
                name: view.of(module._parameters[name]) for name, view in views.items()
            }

    # the compiler would take it for a part of the block
    unit.register_forward_pre_hook(torch.compiler.disable(read))


def sum_copies(parameters: Iterable[nn.Parameter], axis: str, group: dist.ProcessGroup) -> None:
    """Add up over the ranks of `axis` the gradients of parameters that each of them has whole, in one all-reduce."""
    gradients = [
        gradient.to_local()
        for gradient in (parameter.grad for parameter in parameters)
        if isinstance(gradient, DTensor) and _is_whole_on(gradient, axis)
    ]
    if not gradients:
        return
    total = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), group=group)
    for gradient, found in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(found.view_as(gradient))


def _is_whole_on(tensor: DTensor, axis: str) -> bool:
    names = tensor.device_mesh.mesh_dim_names or ()
    return axis in names and tensor.placements[names.index(axis)].is_replicate()


@cache  # layers of one kind share a class, and so one compiled graph
def _class_of(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    return type(f"TP{cls.__name__}", (cls,), {name: _local(name) for name in names})


def _local(name: str) -> property:
    def read(module: Any) -> Any:
        parameter = module._parameters[name]
        # while FSDP has it shared out, over an axis more, everybody wants to see that
        return module.local_parameters.get(name, parameter) if len(parameter.placements) == 1 else parameter

    return property(read)
