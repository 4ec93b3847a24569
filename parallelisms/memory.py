"""Activation checkpointing: recompute blocks in backward instead of keeping what they computed."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import checkpoint

from nanovl.config.schema import ActivationCheckpoint
from nanovl.spec import Model


def apply_activation_checkpointing(model: Model, config: ActivationCheckpoint) -> int:
    """Recompute all blocks (`full`) or every n-th (`selective`); returns how many.

    The block's forward is wrapped rather than the block, so that parameter names stay as they are.
    """
    if config.mode == "none":
        return 0
    stride = 1 if config.mode == "full" else config.every_n_layers
    chosen = model.blocks()[::stride]
    for block in chosen:
        block.forward = _recomputed(block.forward)
    return len(chosen)


def _recomputed(forward: Any) -> Any:
    def run(*args: Any) -> Any:
        # no block draws random numbers, so there is no generator state to replay
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return run
