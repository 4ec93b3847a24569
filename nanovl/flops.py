"""Arithmetic of training, from shapes and documents: three ways to count the keys that attention sees.

Masked scores are never needed, so the exact count is that of keys a query may see. Published numbers often count all
keys in reach instead, as if there were no causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanovl.spec import Model

MeanKeys = Callable[[int | None], float]
"""Window (None = none) -> keys that a query sees, itself included, on average."""


def attended_keys(positions: Iterable[Tensor]) -> MeanKeys:
    """Exact for the documents of a step: a query at place p of its document sees min(p + 1, window) keys."""
    places = torch.cat([part.flatten() for part in positions]) + 1

    @cache  # layers share few windows
    def mean_keys(window: int | None) -> float:
        return (places if window is None else places.clamp(max=window)).double().mean().item()

    return mean_keys


def causal_keys(seq_len: int) -> MeanKeys:
    """Of rows of `seq_len` tokens that are one document each."""

    def mean_keys(window: int | None) -> float:
        seen = min(window or seq_len, seq_len)
        return seen - seen * (seen - 1) / (2 * seq_len)  # the first queries of a row see fewer

    return mean_keys


def reachable_keys(seq_len: int) -> MeanKeys:
    """Without a causal mask and without documents, as published utilisations count: the whole row, or the window."""
    return lambda window: min(window or seq_len, seq_len)


def training_flops_per_token(model: Model, mean_keys: MeanKeys) -> float:
    """Forward and backward: for every product forward, backward makes two of its size, but where a module is spared."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "spared_flops")]
    spared = sum(m.spared_flops(mean_keys) for m in modules)
    return 3 * model.forward_flops_per_token(mean_keys) - spared
