"""FSDP seen from outside: which parameters travel together, how often, and what a rank holds of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nanovl.mesh import Axis, Mesh
from nanovl.planning.ledger import Traffic
from nanovl.spec import Model


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together."""

    shard_elements: int
    """Numbers one rank holds, padding included: those of FSDP's first rank, whose shard no other's exceeds."""
    axis: Axis
    """Ranks that share them."""
    shards: int
    reshards: bool
    """Freed between forward and backward."""
    largest_elements: int
    """Of its largest parameter, when gathered."""

    @property
    def whole_elements(self) -> int:
        """Numbers when gathered; still cut over tensor and expert ranks."""
        return self.shard_elements * self.shards


@dataclass(frozen=True)
class StageUnits:
    """The units of one stage."""

    blocks: list[list[Unit]]
    """Of each block, in order: itself, and its experts where they are apart."""
    root: list[Unit]

    @property
    def all(self) -> list[Unit]:
        return [*chain.from_iterable(self.blocks), *self.root]

    def of(self, layer: int | None) -> list[Unit]:
        """Those of a block; none where there is no such block."""
        return self.blocks[layer] if layer is not None and 0 <= layer < len(self.blocks) else []


def units_of(part: Model, mesh: Mesh, reshards: bool) -> StageUnits:
    """The units of a part after fully_shard; `reshards` = the policy of blocks."""
    blocks = [
        [_unit(module, mesh, reshards) for module in block.modules() if isinstance(module, FSDPModule)]
        for block in part.blocks()
    ]
    return StageUnits(blocks, [_unit(cast(nn.Module, part), mesh, False)])


def _unit(module: nn.Module, mesh: Mesh, reshards: bool) -> Unit:
    parameters = list(_own_parameters(module))
    axis: Axis = "efsdp" if any(_is_on(p, "efsdp") for p in parameters) else "fsdp"
    elements = [local_elements(p) for p in parameters]
    return Unit(
        sum(elements),
        axis,
        mesh.size(axis),
        reshards,
        max(elements, default=0) * mesh.size(axis),
    )


@dataclass(frozen=True)
class UseOfUnits:
    """What a step does with the units."""

    reshards: bool
    """Blocks free their weights between forward and backward."""
    copies: int
    """Of the sharded model (HSDP)."""
    gathers: int
    """Times weights are needed; twice each where they are freed in between."""
    reduces: int
    """Times gradients are summed."""
    micro_batches: int
    param_bytes: int
    """Of one gathered weight."""
    reduce_bytes: int
    """Of one gradient while it is summed."""
    master_bytes: int
    """Of one gradient when it is summed, as of the parameter itself; 0 where both are on the host."""


def fsdp_traffic(units: Iterable[Unit], use: UseOfUnits) -> Traffic:
    """Weights gathered and gradients summed in a step."""
    traffic = Traffic()
    for unit in units:
        gathers = use.gathers * (2 if unit.reshards else 1)
        summed = use.reduces * use.reduce_bytes
        if unit.shards > 1:
            traffic.add(unit.axis, "all-gather", gathers * unit.whole_elements * use.param_bytes, gathers)
            traffic.add(unit.axis, "reduce-scatter", summed * unit.whole_elements, use.reduces)
        if use.copies > 1:
            traffic.add("dp_replicate", "all-reduce", summed * unit.shard_elements, use.reduces)
    return traffic


def gathered_bytes(units: Iterable[Unit], use: UseOfUnits) -> int:
    """Most memory of gathered weights: what stays gathered, and two of the others, one in use and one on its way."""
    sizes = [(unit.whole_elements * use.param_bytes, unit.reshards) for unit in units]
    passing = sorted(size for size, reshards in sizes if reshards)
    return sum(size for size, reshards in sizes if not reshards) + sum(passing[-2:])


def local_elements(tensor: torch.Tensor) -> int:
    """Numbers of a tensor that this rank holds."""
    return prod(tensor.to_local().shape if isinstance(tensor, DTensor) else tensor.shape)


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that this rank holds."""
    return local_elements(tensor) * tensor.element_size()


def _own_parameters(unit: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters of a unit without those of units inside it."""
    inner = {
        id(p)
        for module in unit.modules()
        if module is not unit and isinstance(module, FSDPModule)
        for p in module.parameters()
    }
    return (p for p in unit.parameters() if id(p) not in inner)


def _is_on(parameter: Any, axis: str) -> bool:
    return isinstance(parameter, DTensor) and axis in (parameter.device_mesh.mesh_dim_names or ())
