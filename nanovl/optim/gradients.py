"""All gradients of a job as one vector: its norm over every mesh, clipping, and who is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanovl.dist import all_reduce
from nanovl.optim.gather import local_of


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter], pipeline_group: dist.ProcessGroup | None) -> Tensor:
    """L2 norm of all gradients, over all ranks and, with `pipeline_group`, over all stages; the same everywhere.

    A parameter that two stages hold a copy of belongs to one stage's call only. torch takes norms within a mesh; of
    gradients that are cut alike, each group costs one reduction along each axis.
    """
    parameters = list(parameters)
    alike: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
            alike.setdefault(key, []).append(gradient)
    square = torch.zeros((), device=parameters[0].device)
    for gradients in alike.values():
        norm = torch.nn.utils.get_total_norm(gradients)
        square += (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
    if pipeline_group is not None:
        all_reduce(square, group=pipeline_group)
    return square.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale gradients of global norm `norm` down to `max_norm` (0 = never)."""
    gradients = [local_of(p.grad) for p in parameters if p.grad is not None]
    if max_norm > 0 and gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def nonfinite_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of all parameters whose gradient is infinite or NaN on some rank; all ranks must ask."""
    found = [
        name
        for name, parameter in named_parameters
        if parameter.grad is not None and not local_of(parameter.grad).isfinite().all()
    ]
    if not dist.is_initialized():
        return sorted(found)
    everywhere: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return sorted({name for names in everywhere for name in names})
