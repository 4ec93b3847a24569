"""Collectives along one dimension of a tensor, with gradients.

Gradients are those of the sum of all ranks' losses, so each backward is the transpose of its forward:

    gather                all-gather        backward: reduce-scatter
    reduce_scatter        reduce-scatter    backward: all-gather
    all_reduce            all-reduce        backward: all-reduce
    gather_for_all_alike  all-gather        backward: this rank's own piece

The last is for results of which every rank computes the same loss, which then counts once and not once a rank. Cutting
a tensor that every rank has needs none of these: it is `narrow`, and its transpose pads with zeros.

All wait inside: a pending tensor that enters a compiled block would lose its gradient (torch 2.13). They call the
operators themselves, which the compiler can see through and overlap. What they hand over and give back is detached: a
backend's thread may be the last to hold it, and must not take a graph down with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_c10d = torch.ops._c10d_functional


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The pieces of all ranks, one after the other along `dim`; each rank goes on to something else with them."""
    return _Gather.apply(x, dim, group.size(), group.group_name)


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece along `dim` of the sum over ranks."""
    return _ReduceScatter.apply(x, dim, group.size(), group.group_name)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks; each rank goes on to something else with it."""
    return _AllReduce.apply(x, group.group_name)


def gather_for_all_alike(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The pieces of all ranks, one after the other along `dim`; every rank goes on to the same with them."""
    return _GatherForAllAlike.apply(x, dim, group.size(), group.rank(), group.group_name)


def piece(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece along `dim` of what every rank has."""
    assert x.shape[dim] % group.size() == 0, f"dimension {dim} of {tuple(x.shape)} over {group.size()} ranks"
    size = x.shape[dim] // group.size()
    return x.narrow(dim, group.rank() * size, size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: int, group_name: str) -> Tensor:
        ctx.context = dim, ranks, group_name
        return _gather(x, dim, ranks, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _reduce_scatter(grads[0], *ctx.context), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: int, group_name: str) -> Tensor:
        ctx.context = dim, ranks, group_name
        return _reduce_scatter(x, dim, ranks, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gather(grads[0], *ctx.context), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return _all_reduce(x, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_reduce(grads[0], ctx.group_name), None


class _GatherForAllAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: int, rank: int, group_name: str) -> Tensor:
        size = x.shape[dim]
        ctx.context = dim, rank * size, size
        return _gather(x, dim, ranks, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].narrow(*ctx.context).contiguous(), None, None, None, None


def _gather(x: Tensor, dim: int, ranks: int, group_name: str) -> Tensor:
    parts = _waited(_c10d.all_gather_into_tensor(x.detach().contiguous(), ranks, group_name))
    return parts if dim == 0 else torch.cat(parts.chunk(ranks), dim)


def _reduce_scatter(x: Tensor, dim: int, ranks: int, group_name: str) -> Tensor:
    assert x.shape[dim] % ranks == 0, f"dimension {dim} of {tuple(x.shape)} over {ranks} ranks"
    x = x.detach()
    parts = x if dim == 0 else torch.cat(x.chunk(ranks, dim))
    return _waited(_c10d.reduce_scatter_tensor(parts.contiguous(), "sum", ranks, group_name))


def _all_reduce(x: Tensor, group_name: str) -> Tensor:
    return _waited(_c10d.all_reduce(x.detach().contiguous(), "sum", group_name))


def _waited(result: Tensor) -> Tensor:
    there: Tensor = _c10d.wait_tensor(result)
    return there.detach()
