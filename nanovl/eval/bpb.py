"""Bits per byte on held-out text: the one measure that does not depend on the tokenizer."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovl.models.blocks.head import Head
from nanovl.spec import Batch, Model, run_batch

# B rows, T tokens, D model, V vocabulary


@dataclass(frozen=True)
class BitsPerByte:
    bpb: float
    """sum of nats / (ln 2 x sum of bytes), over targets that stand for bytes."""
    nats: float
    bytes: int
    tokens: int


def bits_per_byte(
    run: Callable[[Batch, Any], Any],
    batches: Sequence[Batch],
    token_bytes_V: Tensor,
    device: torch.device,
    *,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    chunk_tokens: int = 2048,
) -> BitsPerByte:
    """Measure a model on `batches`; special tokens (0 bytes) and ignored targets count in neither sum.

    `run(batch, objective)` runs the model in evaluation mode and returns the objective of (head, hidden states, the
    tokens that are here), or None where another rank has it, such as ParallelModel.evaluate; `total` adds up over
    ranks. All ranks must bring the same number of batches.
    """
    token_bytes_V = token_bytes_V.to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)

    def count(head: Head, x_BTD: Tensor, batch: Batch) -> Tensor:
        targets_BT = batch["targets_BT"]
        counted_BT = (batch["weights_BT"] > 0) & (targets_BT >= 0)
        bytes_BT = token_bytes_V[targets_BT.clamp(min=0)] * counted_BT
        weights_BT = torch.ones_like(batch["weights_BT"])
        nll_BT = head.cross_entropy(x_BTD, targets_BT, weights_BT, chunk_tokens)[1].double()
        has_bytes_BT = bytes_BT > 0
        return torch.stack(
            ((nll_BT * has_bytes_BT).sum(), bytes_BT.sum().double(), has_bytes_BT.sum().double())
        )

    for batch in batches:
        found = run({key: value.to(device) for key, value in batch.items()}, count)
        if found is not None:
            sums += found
    nats, num_bytes, tokens = total(sums).tolist()
    return BitsPerByte(
        nats / (math.log(2) * num_bytes) if num_bytes else math.inf, nats, int(num_bytes), int(tokens)
    )


@torch.no_grad()
def run_alone(model: Model, batch: Batch, objective: Any) -> Any:
    """`objective` on one process's whole model."""
    return run_batch(model, batch, objective)


def compressor_bpb(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors at their best on the same text: the bar a language model must clear."""
    if not text:
        return {}
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
