"""Bits per byte on held-out text: the one measure that does not depend on the tokenizer."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovl.dist import all_reduce
from nanovl.models.blocks.head import Head
from nanovl.spec import Batch

# B rows, T tokens, D model, V vocabulary


@dataclass(frozen=True)
class BitsPerByte:
    bpb: float
    """sum of nats / (ln 2 x sum of bytes), over targets that stand for bytes."""
    nats: float
    bytes: int
    tokens: int


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    batches: Sequence[Batch],
    token_bytes_V: Tensor,
    *,
    loss_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 2048,
) -> BitsPerByte:
    """Measure `model` on `batches`; special tokens (0 bytes) and ignored targets count in neither sum.

    Every rank of `loss_group` must bring the same number of batches.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    token_bytes_V = token_bytes_V.to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        targets_BT = batch["targets_BT"].to(device)
        counted_BT = (batch["weights_BT"].to(device) > 0) & (targets_BT >= 0)
        bytes_BT = token_bytes_V[targets_BT.clamp(min=0)] * counted_BT

        def nll(head: Head, x_BTD: Tensor, targets_BT: Tensor = targets_BT) -> Tensor:
            return head.cross_entropy(
                x_BTD, targets_BT, torch.ones_like(targets_BT, dtype=torch.float32), chunk_tokens
            )[1]

        nll_BT = model(
            batch["tokens_BT"].to(device),
            batch["positions_BT"].to(device),
            batch["doc_ids_BT"].to(device),
            objective=nll,
        )
        has_bytes_BT = bytes_BT > 0
        sums += torch.stack(
            ((nll_BT.double() * has_bytes_BT).sum(), bytes_BT.sum().double(), has_bytes_BT.sum().double())
        )
    model.train(was_training)
    nats, num_bytes, tokens = all_reduce(sums, group=loss_group).tolist()
    return BitsPerByte(
        nats / (math.log(2) * num_bytes) if num_bytes else math.inf, nats, int(num_bytes), int(tokens)
    )


def compressor_bpb(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors at their best on the same text: the bar a language model must clear."""
    if not text:
        return {}
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
