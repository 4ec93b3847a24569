"""Whole matrices out of sharded ones: who works on which, and how the pieces travel there and back.

Muon's direction needs the whole matrix. There are three ways to it, for a stack of equal parameters:

    whole      no mesh axis cuts rows or columns (one rank, replicas, experts apart): nothing travels
    exchange   one mesh axis cuts rows (FSDP2, HSDP): each of its ranks gets an equal share of the matrices
               whole, in one all-to-all, and sends the results back in another; none is computed twice
    full       everything else (tensor parallel, 2-D shards): every rank gathers and computes every matrix

Ranks along replicated axes repeat each other's work. The choice looks only at what all ranks know alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

WholeMatrices = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""From values [n, rows, cols] and side values, [n, rows, 1], [n, 1, cols] or none, to new ones alike."""


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

    def cuts(self) -> list[int]:
        """Mesh axes that cut rows or columns: several ranks, not replicated, not along batch dimensions."""
        return [
            axis
            for axis, placement in enumerate(self.placements)
            if self.mesh is not None
            and self.mesh.size(axis) > 1
            and not isinstance(placement, Replicate)
            and placement.dim >= len(self.shape) - 2
        ]

    def ranks(self) -> int:
        """Ranks that share one copy of the parameter."""
        if self.mesh is None:
            return 1
        return prod(self.mesh.size(i) for i, p in enumerate(self.placements) if not isinstance(p, Replicate))

    def without(self, dim: int) -> Layout:
        """This layout with `dim` shrunk to one, so replicated where it was cut."""
        dim %= len(self.shape)
        shape = torch.Size(1 if i == dim else size for i, size in enumerate(self.shape))
        cut = (not isinstance(p, Replicate) and p.dim == dim for p in self.placements)
        placements = tuple(Replicate() if c else p for c, p in zip(cut, self.placements, strict=True))
        return Layout(shape, self.mesh, placements)

    def wrap(self, local: Tensor) -> Tensor:
        """This rank's shard as a tensor of the whole."""
        if self.mesh is None:
            return local
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )

    def full(self, local: Tensor) -> Tensor:
        """The whole tensor, from all ranks' shards."""
        whole = self.wrap(local)
        return whole.full_tensor() if isinstance(whole, DTensor) else whole

    def shard(self, full: Tensor) -> Tensor:
        """This rank's shard of a whole tensor that every rank has."""
        if self.mesh is None:
            return full
        return local_of(distribute_tensor(full, self.mesh, self.placements, src_data_rank=None))


def local_of(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory (under no_grad)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_whole_matrices(
    function: WholeMatrices,
    values: Tensor,
    side: Tensor | None,
    layout: Layout,
    side_layout: Layout,
    turn: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """`function` of the whole matrices, given and returned as this rank's shards, stacked [n, *local].

    Every rank of the mesh must call this with the same n. `turn` rotates who gets the matrices left over when
    the ranks do not divide their number: pass how many were handed out before.
    """
    cuts = layout.cuts()
    if cuts and not _only_rows(layout, cuts):
        return _full(function, values, side, layout, side_layout)
    matrices, flat_side = values.flatten(0, -3), None if side is None else side.flatten(0, -3)
    if cuts and layout.mesh is not None:
        group = layout.mesh.get_group(cuts[0])
        result, new_side = _exchange(function, matrices, flat_side, layout.shape[-2], group, turn)
    else:
        result, new_side = function(matrices, flat_side)
    if side is None or new_side is None:
        return result.reshape(values.shape), None
    return result.reshape(values.shape), new_side.reshape(side.shape)


def _only_rows(layout: Layout, cuts: list[int]) -> bool:
    """Whether the one cut is torch's plain one, of rows; a strided shard is another."""
    placement = layout.placements[cuts[0]]
    return len(cuts) == 1 and type(placement) is Shard and placement.dim == len(layout.shape) - 2


def chunk_sizes(size: int, ranks: int) -> list[int]:
    """Rows each rank holds of `size` under Shard: equal chunks, rounded up, until none are left."""
    chunk = -(-size // ranks)
    return [max(0, min(chunk, size - rank * chunk)) for rank in range(ranks)]


def share_sizes(count: int, ranks: int, turn: int) -> list[int]:
    """Matrices each rank works on: as equal as can be, those left over from rank `turn` on."""
    base, left = divmod(count, ranks)
    return [base + ((rank - turn) % ranks < left) for rank in range(ranks)]


def _exchange(
    function: WholeMatrices,
    values: Tensor,
    side: Tensor | None,
    rows: int,
    group: dist.ProcessGroup,
    turn: int,
) -> tuple[Tensor, Tensor | None]:
    """`values` [m, local rows, cols]: matrices are shared out in order, so the stack lies packed by owner.

    Side values of rows are cut like the rows and travel as one column more. Those of columns every rank has:
    they stay, and the new ones travel back to each rank as one row more.
    """
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    shares, heights = share_sizes(len(values), ranks, turn), chunk_sizes(rows, ranks)
    height, cols = heights[me], values.shape[-1]
    assert values.shape[1] == height, (
        f"{values.shape[1]} local rows of {rows} on rank {me} of {ranks}: not Shard's {height}"
    )
    side_of_rows = side is not None and side.shape[-1] == 1
    side_of_cols = side is not None and not side_of_rows

    sent = torch.cat([values, side], dim=-1) if side is not None and side_of_rows else values
    whole = _all_to_all(sent.split(shares), [(shares[me], h, sent.shape[-1]) for h in heights], group, dim=1)
    my_side = whole[..., cols:] if side_of_rows else side.split(shares)[me] if side is not None else None
    result, new_side = function(whole[..., :cols].contiguous(), my_side)

    if new_side is not None and side_of_rows:
        result = torch.cat([result, new_side], dim=-1)
    parts = result.split(heights, dim=1)
    if new_side is not None and side_of_cols:
        parts = [torch.cat([part, new_side], dim=1) for part in parts]
    back = _all_to_all(parts, [(s, height + side_of_cols, result.shape[-1]) for s in shares], group, dim=0)
    if side is None:
        return back, None
    if side_of_cols:
        return back[:, :height].contiguous(), back[:, height:]
    return back[..., :cols].contiguous(), back[..., cols:]


def _all_to_all(
    sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: dist.ProcessGroup, dim: int
) -> Tensor:
    """Tensor r of `sent` goes to rank r; what rank r sent, of shape `shapes[r]`, is joined along `dim`."""
    sizes = [prod(shape) for shape in shapes]
    flat = torch.cat([tensor.reshape(-1) for tensor in sent])
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [tensor.numel() for tensor in sent], group=group)
    return torch.cat(
        [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)], dim=dim
    )


def _full(
    function: WholeMatrices, values: Tensor, side: Tensor | None, layout: Layout, side_layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """One parameter at a time, so that only one is whole at once."""
    results, new_sides = [], []
    rows, cols = layout.shape[-2:]
    for i, value in enumerate(values):
        whole_side = None if side is None else side_layout.full(side[i])
        result, new_side = function(
            layout.full(value).reshape(-1, rows, cols),
            None if whole_side is None else whole_side.reshape(-1, *whole_side.shape[-2:]),
        )
        results.append(layout.shard(result.reshape(layout.shape)))
        if new_side is not None:
            new_sides.append(side_layout.shard(new_side.reshape(side_layout.shape)))
    return torch.stack(results), torch.stack(new_sides) if new_sides else None
