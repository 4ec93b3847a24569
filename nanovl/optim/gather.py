"""Whole matrices out of sharded ones: who works on which, and how the pieces travel there and back.

Muon's direction needs the whole matrix. The ranks that hold pieces of the same matrices, replicas included, are a
*team*: all ranks of the mesh that agree on the axes which cut the stack (experts apart). A team shares out its
matrices evenly. One all-to-all brings each owner every piece of its matrices once, from its own replica; it computes;
another all-to-all brings every rank its pieces of the result. So no matrix is computed twice on any mesh, and a team
of one (one rank, experts apart and not replicated) sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

WholeMatrices = Callable[[list[Tensor]], list[Tensor]]
"""From stacks of whole matrices, each [n, rows, cols], to new ones of the same shapes."""


@dataclass(frozen=True)
class Layout:
    """Shape of a whole parameter and how a mesh cuts it; equal for those that can be worked on together."""

    shape: torch.Size
    mesh: DeviceMesh | None = None
    placements: tuple[Any, ...] = ()

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        if isinstance(tensor, DTensor):
            return Layout(tensor.shape, tensor.device_mesh, tuple(tensor.placements))
        return Layout(tensor.shape)

    def axes(self, cutting: Callable[[int], bool]) -> list[int]:
        """Mesh axes whose cut dimension satisfies `cutting`."""
        return [i for i, p in enumerate(self.placements) if not p.is_replicate() and cutting(p.dim)]

    def without(self, dim: int) -> Layout:
        """This layout with `dim` shrunk to one, so replicated where it was cut."""
        dim %= len(self.shape)
        shape = torch.Size(1 if i == dim else size for i, size in enumerate(self.shape))
        cut = self.axes(lambda d: d == dim)
        return Layout(
            shape, self.mesh, tuple(Replicate() if i in cut else p for i, p in enumerate(self.placements))
        )

    def wrap(self, local: Tensor) -> Tensor:
        """This rank's shard as a tensor of the whole."""
        if self.mesh is None:
            return local
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )

    def piece(self, coordinate: Sequence[int]) -> tuple[slice, ...]:
        """What the rank at `coordinate` of the mesh holds, a slice for each dimension.

        FSDP2 over tensor parallelism cuts a dimension a second time, from an axis further left; its strided shard says
        so. Axes are therefore taken from left to right, but strided ones last, from right to left.
        """
        starts, stops, parts = [0] * len(self.shape), list(self.shape), [1] * len(self.shape)
        strided = [i for i, p in enumerate(self.placements) if isinstance(p, _StridedShard)]
        plain = [i for i, p in enumerate(self.placements) if isinstance(p, Shard) and i not in strided]
        for axis in (*plain, *reversed(strided)):
            assert self.mesh is not None
            placement, ranks = self.placements[axis], self.mesh.size(axis)
            dim = placement.dim
            assert axis in plain or placement.split_factor == parts[dim], f"{self.placements}: not of FSDP2"
            chunk = -(-(stops[dim] - starts[dim]) // ranks)  # rounded up, as torch.chunk has it
            starts[dim] = min(starts[dim] + chunk * coordinate[axis], stops[dim])
            stops[dim] = min(starts[dim] + chunk, stops[dim])
            parts[dim] *= ranks
        return tuple(map(slice, starts, stops))


def local_of(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory (under no_grad)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_sizes(count: int, ranks: int, turn: int) -> list[int]:
    """Matrices each rank works on: as equal as can be, those left over from rank `turn` on."""
    base, left = divmod(count, ranks)
    return [base + ((rank - turn) % ranks < left) for rank in range(ranks)]


Box = tuple[slice, slice, slice]
"""All matrices of a stack, and some rows and columns of each."""


@dataclass(frozen=True)
class Member:
    """One rank of a team."""

    rank: int
    """In the whole job."""
    copy: tuple[int, ...]
    """Its place along the replicated axes: the members of one copy hold every piece once."""
    boxes: tuple[Box, ...]
    """What it holds of each kind of values."""

    def sizes(self) -> list[tuple[int, ...]]:
        """Shape of each kind's piece of one matrix."""
        return [tuple(part.stop - part.start for part in box[1:]) for box in self.boxes]

    def length(self) -> int:
        """Numbers in all pieces of one matrix."""
        return sum(map(prod, self.sizes()))

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Pieces [n, rows, cols] of each kind, from [n, length]; the reverse of `pack`."""
        parts = packed.split([prod(size) for size in self.sizes()], dim=1)
        return [part.unflatten(1, size) for part, size in zip(parts, self.sizes(), strict=True)]


def pack(pieces: Iterable[Tensor]) -> Tensor:
    """The pieces of a matrix, of all kinds, in one row."""
    return torch.cat([piece.flatten(1) for piece in pieces], dim=1)


class Exchange:
    """The way to whole matrices and back for parameters of one layout."""

    def __init__(self, layouts: Sequence[Layout], groups: Groups) -> None:
        """`layouts` = the parameters' own, then those of values beside them, with rows or columns shrunk to one."""
        self.shapes = [layout.shape[-2:] for layout in layouts]
        self.team = _team(layouts)
        ranks = [member.rank for member in self.team]
        self.group = groups.of(layouts[0].mesh, ranks)
        self.place = ranks.index(dist.get_rank()) if len(ranks) > 1 else 0

    def __call__(self, function: WholeMatrices, values: Sequence[Tensor], turn: int = 0) -> list[Tensor]:
        """`function` of the whole matrices, given and returned as this rank's shards, stacked [n, *local].

        Every rank of the mesh must call this with the same n. `turn` rotates who gets the matrices left over when the
        ranks do not divide their number: pass how many were handed out before.
        """
        stacks = [tensor.flatten(0, -3) for tensor in values]
        results = function(stacks) if len(self.team) == 1 else self._travel(function, stacks, turn)
        return [result.view(tensor.shape) for result, tensor in zip(results, values, strict=True)]

    def _travel(self, function: WholeMatrices, stacks: list[Tensor], turn: int) -> list[Tensor]:
        me = self.team[self.place]
        held = [tuple(stack.shape[1:]) for stack in stacks]
        assert held == me.sizes(), f"rank {me.rank} holds {held} of {self.shapes}, not {me.sizes()}"
        shares = share_sizes(len(stacks[0]), len(self.team), turn)  # consecutive ones, in the team's order
        mine = shares[self.place]

        mates = [member.copy == me.copy for member in self.team]  # an owner is served by its own copy
        parts = pack(stacks).split(shares)
        received = self._all_to_all(
            [part if mate else part[:0] for part, mate in zip(parts, mates, strict=True)],
            [(mine if mate else 0, member.length()) for member, mate in zip(self.team, mates, strict=True)],
        )
        wholes = [stacks[0].new_empty(mine, *shape) for shape in self.shapes]
        for member, mate, packed in zip(self.team, mates, received, strict=True):
            if mate:
                for whole, box, piece in zip(wholes, member.boxes, member.unpack(packed), strict=True):
                    whole[box] = piece

        results = function(wholes)

        received = self._all_to_all(
            [pack(result[box] for result, box in zip(results, m.boxes, strict=True)) for m in self.team],
            [(share, me.length()) for share in shares],
        )
        return [piece.contiguous() for piece in me.unpack(torch.cat(received))]

    def _all_to_all(self, sent: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """`sent[i]` goes to member i; what member i sent, of shape `shapes[i]`, comes in its place."""
        sizes = [prod(shape) for shape in shapes]
        flat = torch.cat([tensor.flatten() for tensor in sent])
        received = flat.new_empty(sum(sizes))
        dist.all_to_all_single(received, flat, sizes, [tensor.numel() for tensor in sent], group=self.group)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def _team(layouts: Sequence[Layout]) -> list[Member]:
    """The ranks that hold pieces of the same matrices as this one, in the order of a process group: by rank."""
    layout, mesh = layouts[0], layouts[0].mesh
    if mesh is None:
        return [Member(0, (), _boxes(layouts, ()))]
    here = mesh.get_coordinate()
    assert here is not None, "this rank is not in the parameter's mesh"
    apart = layout.axes(lambda dim: dim < len(layout.shape) - 2)
    copies = [i for i, placement in enumerate(layout.placements) if placement.is_replicate()]
    members = []
    for there in product(*([here[i]] if i in apart else range(mesh.size(i)) for i in range(mesh.ndim))):
        copy = tuple(there[i] for i in copies)
        members.append(Member(int(mesh.mesh[there]), copy, _boxes(layouts, there)))
    return sorted(members, key=lambda member: member.rank)


def _boxes(layouts: Sequence[Layout], coordinate: Sequence[int]) -> tuple[Box, ...]:
    pieces = [layout.piece(coordinate) for layout in layouts]
    return tuple((slice(None), piece[-2], piece[-1]) for piece in pieces)


class Groups:
    """Process groups of teams, made once each.

    All ranks of a team must ask in the same order. Nobody else takes part: DeviceMesh._flatten or a plain new_group
    must be called by every rank of the job, and another pipeline stage may have no such parameters.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, mesh: DeviceMesh | None, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Group of exactly `ranks`, ascending: the world's or a mesh axis's, where they are the same; None for one."""
        if mesh is None or len(ranks) == 1:
            return None
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        for group in mesh.get_all_groups():
            if dist.get_process_group_ranks(group) == list(ranks):
                return group
        if tuple(ranks) not in self.made:
            self.made[tuple(ranks)] = dist.new_group(list(ranks), use_local_synchronization=True)
        return self.made[tuple(ranks)]
