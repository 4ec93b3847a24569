"""Attention to the keys that an indexer chooses, and the loss from which the indexer learns to.

What it is to foresee are the weights that attention gives to keys, summed over heads and made to sum to 1:

    p_ts = sum_h a_hts / sum_hs a_hts,    loss = mean_t KL(p_t || softmax_s I_ts)

over the keys that attention sees, with p held fixed, as DeepSeek-V3.2 trains it. The loss has no gradient into
attention, and that of the predictions none into the indexer. The mean is over all tokens of the step, padding too; so
there is none outside of a step.

Nothing of the size queries x keys x heads is kept: chunk by chunk of queries the gradients are computed with the loss,
with g_ts = softmax_s(I_ts) - p_ts and u_tis = w_ti n^-1/2 d^-1/2 [q_ti k_s > 0] g_ts
    dw_ti = n^-1/2 sum_s g_ts relu(d^-1/2 q_ti k_s),    dq_ti = sum_s u_tis k_s,    dk_s = sum_ti u_tis q_ti.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanovl.models.blocks.attention import AttentionCore, AttentionMeta, Scores, attend
from nanovl.models.blocks.indexer import (
    Index,
    IndexerConfig,
    chosen,
    chunks,
    head_scores,
    head_weights,
    index_scores,
    visible_to,
)
from nanovl.models.blocks.side_loss import counted, joined

# B batch, T query tokens, S key tokens, C query tokens of a chunk, D head channels, H heads, I index heads


class SparseCore(AttentionCore):
    """softmax(scale q k^T) v over the keys that the mask shows and the index chooses."""

    def __init__(
        self,
        window: int | None,
        num_key_value_heads: int,
        head_dim: int,
        scores: Scores,
        value_dim: int,
        indexer: IndexerConfig,
    ) -> None:
        super().__init__(window, num_key_value_heads, head_dim, scores, value_dim)
        self.indexer = indexer
        self.chunks = chunks  # how queries are taken piece by piece
        self.loss = None if indexer.index_loss == "none" else IndexLoss(scores)

    def forward(  # type: ignore[override]
        self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, meta: AttentionMeta, index: Index
    ) -> Tensor:
        """-> [B, T, H, D]."""
        mask = meta.masks[self.window]
        learns = self.loss is not None and self.loss.step_tokens > 0 and index.q_BTID.requires_grad
        loss = self.loss if learns else None
        if loss is None or self.indexer.index_loss == "sparse":
            mask = chosen(index, mask, self.indexer.index_topk, self.chunks)
        out_BTHD = attend(q_BTHD, k_BSHD, v_BSHD, mask, is_causal=mask is None, scores=self.scores)
        if loss is None:
            return out_BTHD
        return joined(out_BTHD, loss(q_BTHD.detach(), k_BSHD.detach(), index, mask))


class IndexLoss(nn.Module):
    """This micro-batch's part of the step's loss of one indexer; what its backward leaves behind is a gradient."""

    tally: Tensor

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores
        self.chunks = chunks
        # attention weights of this rank's heads [B, C, S] -> of all; a child, so that parallelisms can sum them
        self.all_heads = nn.Identity()
        self.share = 1.0  # of this rank, where others compute the same
        self.step_tokens = 0  # of all ranks: what the loss is a mean over; 0 = in no step, and no loss
        # sum over tokens of the loss, and tokens
        self.register_buffer("tally", torch.zeros(2, dtype=torch.float64), persistent=False)

    def init_buffers(self, device: torch.device) -> None:
        """Nothing counted yet."""
        self.tally.zero_()

    def forward(self, q_BTHD: Tensor, k_BSHD: Tensor, index: Index, mask: Tensor | None) -> Tensor:
        loss, gradients = self.loss_and_gradients(q_BTHD, k_BSHD, Index(*(x.detach() for x in index)), mask)
        tokens = loss.new_full((), q_BTHD.shape[0] * q_BTHD.shape[1])
        seen = self.share * torch.stack((loss, tokens)).double()
        # a scalar whose gradients are these; its value means nothing
        terms = [(x * gradient).sum() for x, gradient in zip(index, gradients, strict=True)]
        return counted(sum(terms[1:], terms[0]) * (self.share / self.step_tokens), self.tally, seen)

    @torch.no_grad()
    def loss_and_gradients(
        self, q_BTHD: Tensor, k_BSHD: Tensor, index: Index, mask: Tensor | None
    ) -> tuple[Tensor, Index]:
        """Sum of the loss over tokens, and its gradient by each part of the index, float32."""
        (batch, tokens, heads, _), keys = q_BTHD.shape, k_BSHD.shape[1]
        index_heads, head_dim = index.q_BTID.shape[2:]
        loss, dk_BSD = (
            torch.zeros((), device=q_BTHD.device),
            torch.zeros_like(index.k_BSD, dtype=torch.float32),
        )
        dq, dw = [], []
        for rows in self.chunks(tokens, batch * max(heads, index_heads) * keys):
            seen_BCS = visible_to(rows, mask, keys, q_BTHD.device)
            p_BCS = self.attended(q_BTHD[:, rows], k_BSHD, seen_BCS)
            score_BCIS, w_BCI = head_scores(index, rows), head_weights(index, rows)
            log_BCS = index_scores(score_BCIS, w_BCI).masked_fill(~seen_BCS, float("-inf")).log_softmax(-1)
            loss = loss + (p_BCS.xlogy(p_BCS) - p_BCS * log_BCS.masked_fill(~seen_BCS, 0.0)).sum()
            g_BCS = log_BCS.exp() - p_BCS
            dw.append(torch.einsum("bcs,bcis->bci", g_BCS, score_BCIS) * index_heads**-0.5)
            u_BCIS = g_BCS[:, :, None] * w_BCI[..., None] * (score_BCIS > 0) * head_dim**-0.5
            dq.append(torch.einsum("bcis,bsd->bcid", u_BCIS, index.k_BSD.float()))
            dk_BSD = dk_BSD + torch.einsum("bcis,bcid->bsd", u_BCIS, index.q_BTID[:, rows].float())
        return loss, Index(torch.cat(dq, dim=1), dk_BSD, torch.cat(dw, dim=1))

    def attended(self, q_BCHD: Tensor, k_BSHD: Tensor, seen_BCS: Tensor) -> Tensor:
        """p [B, C, S]: how attention shares a query out over the keys it sees."""
        score_BHCS = torch.einsum("bchd,bshd->bhcs", q_BCHD, k_BSHD).float()
        scale = q_BCHD.shape[-1] ** -0.5 if self.scores.scale is None else self.scores.scale
        weight_BHCS = (score_BHCS * scale).masked_fill(~seen_BCS[:, None], float("-inf")).softmax(-1)
        p_BCS: Tensor = self.all_heads(weight_BHCS.sum(1))
        return p_BCS / p_BCS.sum(-1, keepdim=True)


def index_losses(model: nn.Module) -> list[Any]:
    """The losses of `model`'s indexers, in order."""
    return [m for m in model.modules() if isinstance(m, IndexLoss)]
