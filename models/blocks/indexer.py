"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2): cheap scores that choose each query's keys.

    I_ts = n^-1/2 sum_i w_ti relu(d^-1/2 q_ti k_s),   w, k from x, q from the queries' latent; k normed (LayerNorm)

Queries have n heads of d channels, keys one for all heads; the first channels of both turn, as many as those of the
attention it serves. A query attends to the `index_topk` keys it sees with the highest I, in float32. As in
transformers, without the Hadamard rotation and the 8-bit floats of DeepSeek's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nanovl.models.blocks.rope import apply_rope
from nanovl.spec import FREE

# B batch, T query tokens, S key tokens, C query tokens of a chunk, D model channels in x and head channels elsewhere,
# L channels of the queries' latent, F frequencies, I index heads

NUMBERS_AT_ONCE = 2**27
"""Scores by head that exist at a time: queries are worked on in chunks."""


@dataclass(kw_only=True, frozen=True)
class IndexerConfig:
    index_n_heads: int
    """Heads of the index; with few, many scores are exactly 0 and their order is arbitrary."""
    index_head_dim: int
    """Channels of each."""
    index_topk: int
    """Keys a query attends to; all it sees where those are fewer."""
    index_loss: Literal["none", "dense", "sparse"] = field(default="sparse", metadata=FREE)
    """What it learns from: KL(attention summed over heads || softmax of I), over the chosen keys (`sparse`) or over all
    (`dense`: warm-up, in which training attends to all keys; evaluation and engine choose even then)."""

    def mistakes(self) -> list[str]:
        """What cannot be, as `key = value: wanted`."""
        keys = ("index_n_heads", "index_head_dim", "index_topk")
        return [
            f"{key} = {getattr(self, key)}: wants a number above 0" for key in keys if getattr(self, key) < 1
        ]

    @property
    def training_keys(self) -> int | None:
        """Keys a query attends to in training at most; None = all."""
        return None if self.index_loss == "dense" else self.index_topk


class Index(NamedTuple):
    """What queries and keys are scored by."""

    q_BTID: Tensor
    k_BSD: Tensor
    weights_BTI: Tensor


class Indexer(nn.Module):
    """x and the queries' latent -> index. Its inputs are cut off from what made them: it learns from its own loss."""

    def __init__(self, config: IndexerConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        heads, head_dim = config.index_n_heads, config.index_head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(latent_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.k_layer_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, heads, bias=False)

    def forward(self, x_BTD: Tensor, latent_BTL: Tensor, cos_BT1F: Tensor, sin_BT1F: Tensor) -> Index:
        x_BTD, latent_BTL = x_BTD.detach(), latent_BTL.detach()
        q_BTID = self.q_proj(latent_BTL).unflatten(2, (-1, self.head_dim))
        k_BT1D = self.k_layer_norm(self.k_proj(x_BTD))[:, :, None]
        q_BTID, k_BT1D = (apply_rope(part, cos_BT1F, sin_BT1F) for part in (q_BTID, k_BT1D))
        return Index(q_BTID, k_BT1D[:, :, 0], self.weights_proj(x_BTD))


def head_scores(index: Index, rows: slice) -> Tensor:
    """relu(d^-1/2 q k) of the queries in `rows`, [B, C, I, S] float32."""
    q_BCID = index.q_BTID[:, rows].float()
    score_BCIS = torch.einsum("bcid,bsd->bcis", q_BCID, index.k_BSD.float())
    return (score_BCIS * q_BCID.shape[-1] ** -0.5).relu()


def head_weights(index: Index, rows: slice) -> Tensor:
    """n^-1/2 w of the queries in `rows`, [B, C, I] float32."""
    return index.weights_BTI[:, rows].float() * index.weights_BTI.shape[-1] ** -0.5


def index_scores(scores_BCIS: Tensor, weights_BCI: Tensor) -> Tensor:
    """I [B, C, S] from those of the heads."""
    return torch.einsum("bci,bcis->bcs", weights_BCI, scores_BCIS)


def chunks(tokens: int, numbers_a_token: int) -> Iterator[slice]:
    """`tokens` queries in pieces of NUMBERS_AT_ONCE numbers at most, one query at least."""
    size = max(1, NUMBERS_AT_ONCE // numbers_a_token)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


@torch.no_grad()
def chosen(
    index: Index, mask: Tensor | None, topk: int, in_chunks: Callable[[int, int], Iterable[slice]] = chunks
) -> Tensor | None:
    """`mask` less the keys that are not among a query's best `topk`, [B, 1, T, S]; as it is where all fit.

    Without a mask there are as many queries as keys, and each sees those before it and itself.
    """
    keys = index.k_BSD.shape[1]
    if keys <= topk:
        return mask
    parts = []
    for rows in in_chunks(index.q_BTID.shape[1], index.weights_BTI[:, 0].numel() * keys):
        seen_BCS = visible_to(rows, mask, keys, index.k_BSD.device)
        score_BCS = index_scores(head_scores(index, rows), head_weights(index, rows))
        score_BCS = score_BCS.masked_fill(~seen_BCS, float("-inf"))
        best_BCS = torch.zeros_like(score_BCS, dtype=torch.bool)
        best_BCS.scatter_(-1, score_BCS.topk(topk, dim=-1).indices, True)
        parts.append(best_BCS & seen_BCS)  # who sees fewer keys has chosen unseen ones too
    return torch.cat(parts, dim=1)[:, None]


def visible_to(rows: slice, mask: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """Which keys the queries in `rows` see, [B or 1, C, S]; without a mask a query sees those before it and itself."""
    if mask is not None:
        return mask[:, 0, rows]
    query_C = torch.arange(rows.start, rows.stop, device=device)
    return (torch.arange(keys, device=device) <= query_C[:, None])[None]
