"""Running a model that belongs to someone else: a trainer finds it afterwards as it left it.

A trainer's model may be in training mode, compiled block by block, and sharded by FSDP over many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and compiled blocks run as they are written.

    Their graphs know nothing of a cache, and must not be compiled anew for it. No inference mode: FSDP would
    gather weights in it that training cannot use.
    """
    modules = list(model.modules())
    in_training = [module for module in modules if module.training]
    for module in in_training:
        module.training = False
    with ExitStack() as stack:
        if any(module._compiled_call_impl is not None for module in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # its import is not free
        stack.enter_context(torch.no_grad())
        try:
            yield
        finally:
            for module in in_training:
                module.training = True


def release_gathered(model: nn.Module) -> None:
    """Free the weights that FSDP keeps gathered after a forward: the module holds its sharded parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The ranks that must make the same calls of `model`; None = this one alone."""
    parameter = next(model.parameters())
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def same_everywhere(ids_B: Tensor, mesh: DeviceMesh | None) -> None:
    """Overwrite `ids_B` with those of the mesh's first rank, in place."""
    if mesh is None:
        return
    for dim in range(mesh.ndim):  # along one axis after the other, the first rank's values reach all
        if mesh.size(dim) > 1:
            dist.broadcast(ids_B, group=mesh.get_group(dim), group_src=0)
