"""Modules cut over tensor ranks. Each is the module it was, with this rank's part of the weights and other ranks asked.

A linear whose output features are cut needs nothing of this: it is itself with fewer features.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.dist import all_reduce as reduce_in_place
from nanovl.models.blocks.head import ChunkedCrossEntropy, Head, softcapped
from nanovl.models.blocks.norm import RMSNorm
from nanovl.parallelisms.collectives import all_reduce, gather_for_all_alike, reduce_scatter

# B batch, T tokens, D model, C tokens of a chunk; of this rank: F features (of heads or MLP), V vocabulary entries

SEQUENCE = 1
"""The dimension that is cut between modules."""


class OverRanks:
    """What these modules have in common."""

    tp: dist.ProcessGroup


class RowLinear(nn.Linear, OverRanks):
    """Reads this rank's input features of whole rows; the ranks' outputs are summed, and each keeps its tokens."""

    def forward(self, x_BTF: Tensor) -> Tensor:
        out_BTD = reduce_scatter(F.linear(x_BTF, self.weight), SEQUENCE, self.tp)
        return out_BTD if self.bias is None else out_BTD + self.bias


class VocabEmbedding(nn.Embedding, OverRanks):
    """Knows this rank's entries; what the others know is added."""

    cuts_sequence: bool
    """Whether each rank keeps its tokens alone."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        weight_VD = self.weight
        index_BT = tokens_BT - self.tp.rank() * len(weight_VD)
        elsewhere_BT = (index_BT < 0) | (index_BT >= len(weight_VD))
        x_BTD = F.embedding(index_BT.masked_fill(elsewhere_BT, 0), weight_VD)
        x_BTD = x_BTD.masked_fill(elsewhere_BT[..., None], 0.0)
        return reduce_scatter(x_BTD, SEQUENCE, self.tp) if self.cuts_sequence else all_reduce(x_BTD, self.tp)


class WidthNorm(RMSNorm, OverRanks):
    """RMS norm over features of which each rank has as many; where they are copies, all have as many copies."""

    def forward(self, x_BTF: Tensor) -> Tensor:
        x32_BTF = x_BTF.float()
        features = self.tp.size() * x_BTF.shape[-1]
        square_BT1 = all_reduce(x32_BTF.square().sum(-1, keepdim=True), self.tp) / features
        out_BTF = x32_BTF * torch.rsqrt(square_BT1 + self.eps)
        return self.scaled(out_BTF, x_BTF.dtype)


class VocabHead(Head, OverRanks):
    """Logits of this rank's entries. Their gradient by the hidden states is this rank's share, to be summed."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """-> whole logits [..., V] float32, the same on every rank, which is to use them alike."""
        raw_BTV = gather_for_all_alike(F.linear(x_BTD, self.weight), x_BTD.ndim - 1, self.tp)
        return softcapped(raw_BTV[..., : self.vocab_size].float(), self.softcap)

    def cross_entropy(
        self, x_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """As of the whole head, the same on every rank."""
        weight_VD = self.weight
        loss, nll_N = ChunkedCrossEntropy.apply(
            x_BTD.flatten(0, 1),
            weight_VD,
            targets_BT.flatten(),
            weights_BT.flatten(),
            partial(
                vocab_chunk_loss,
                softcap=self.softcap,
                start=self.tp.rank() * len(weight_VD),
                vocab_size=self.vocab_size,
                group=self.tp,
            ),
            chunk_tokens,
        )
        return loss, nll_N.view(targets_BT.shape)


def vocab_chunk_loss(
    raw_CV: Tensor,
    targets_C: Tensor,
    weights_C: Tensor,
    wants_grad: bool,
    *,
    softcap: float | None,
    start: int,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_loss` where this rank has the logits of entries `start` and on; those past `vocab_size` only pad."""
    u_CV = softcapped(raw_CV.float(), softcap)
    slope_CV = None if softcap is None or not wants_grad else 1.0 - (u_CV / softcap).square()
    if start + raw_CV.shape[1] > vocab_size:
        u_CV[:, max(vocab_size - start, 0) :] = float("-inf")
    max_C = reduce_in_place(u_CV.amax(dim=-1), "max", group)
    valid_C = targets_C >= 0
    index_C1 = (targets_C - start)[:, None]
    here_C1 = valid_C[:, None] & (index_C1 >= 0) & (index_C1 < raw_CV.shape[1])
    index_C1 = index_C1.clamp(0, raw_CV.shape[1] - 1)
    target_C = torch.where(here_C1, u_CV.gather(1, index_C1), 0.0)[:, 0]
    p_CV = u_CV.sub_(max_C[:, None]).exp_()
    total_C, target_C = reduce_in_place(torch.stack((p_CV.sum(-1), target_C)), group=group)
    nll_C = torch.where(valid_C, total_C.log() + max_C - target_C, 0.0)
    if not wants_grad:
        return nll_C, None
    w_C1 = (weights_C * valid_C)[:, None]
    d_CV = p_CV.mul_(w_C1 / total_C[:, None]).scatter_add_(1, index_C1, torch.where(here_C1, -w_C1, 0.0))
    if slope_CV is not None:
        d_CV *= slope_CV
    return nll_C, d_CV.to(raw_CV.dtype)


class SumOfHeads(nn.Module):
    """What this rank's heads add up to -> what all do; without a gradient."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x_BCS: Tensor) -> Tensor:
        return all_reduce(x_BCS, self.group)
