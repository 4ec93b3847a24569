"""Activation checkpointing: recompute blocks in backward instead of keeping what they computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanovl.config.schema import ActivationCheckpoint
from nanovl.parallelisms.context_ring import ring_attention
from nanovl.spec import Model


def apply_activation_checkpointing(model: Model, config: ActivationCheckpoint) -> int:
    """Recompute all blocks (`full`), every n-th (`selective`), or of all blocks the cheap operations (`op`).

    Returns how many blocks. The block's forward is wrapped rather than the block, so that parameter names stay.
    """
    if config.mode == "none":
        return 0
    stride = config.every_n_layers if config.mode == "selective" else 1
    # no block draws random numbers, so there is no generator state to replay
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.mode == "op":
        how["context_fn"] = _keep_costly_operations
    # by the place in the whole model, so that pipeline stages choose the same blocks as one rank
    chosen = [block for index, block in model.numbered_blocks().items() if index % stride == 0]
    for block in chosen:
        block.forward = _recomputed(block.forward, how)
    return len(chosen)


def _recomputed(forward: Any, how: dict[str, Any]) -> Any:
    def run(*args: Any) -> Any:  # a partial would not compile
        return checkpoint(forward, *args, **how)

    return run


_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
COSTLY = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    ring_attention._opoverload,
    _c10d.reduce_scatter_tensor.default,
    _c10d.all_gather_into_tensor.default,
    _c10d.all_to_all_single.default,
    _c10d.all_reduce.default,
}
"""Results that are kept: attention, whose work grows with the square of the row, and what came over the network."""
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten._grouped_mm.default}
"""Of these every second one is kept: half the arithmetic for half the memory."""


def _keep_costly_operations() -> Any:
    """Contexts of one block's forward and of its recomputation, which must count alike."""
    seen: Counter[bool] = Counter()

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operation in COSTLY
        if operation in PRODUCTS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
