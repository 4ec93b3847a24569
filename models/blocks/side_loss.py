"""Losses that layers have of their own, beside that of the predictions: their gradients, and what is seen of them.

Both act in backward, which runs once for each micro-batch: a recomputed forward is not counted twice, and evaluation
not at all. They are nodes of their own, so that a backward in two halves (pipelines) runs each in one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def joined(x: Tensor, loss: Tensor) -> Tensor:
    """`x` as it is; its backward also starts that of the scalar `loss`, with gradient 1."""
    return _Joined.apply(x, loss)


def counted(x: Tensor, tally: Tensor, seen: Tensor) -> Tensor:
    """`x` as it is; its backward adds `seen` to `tally`."""
    return _Counted.apply(x, tally, seen)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[0].new_ones((), dtype=ctx.dtype)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tally: Tensor, seen: Tensor) -> Tensor:
        ctx.tally, ctx.seen = tally, seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.tally.add_(ctx.seen)
        return grads[0], None, None
