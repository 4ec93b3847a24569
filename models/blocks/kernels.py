"""Ways to compute softmax(q k^T) v: torch's fused attention, the formula written out, and FlexAttention.

Fused attention is the fastest and knows neither a cap on scores nor sinks. With cap c, heat h of a query (1 unless
given) and sink s of a head:

    score_ts = h_t c tanh(scale q_t k_s / c),   weight_ts = exp(score_ts) / (exp(s) + sum_s' exp(score_ts'))

The sink is one more key of value 0, so the output is that without it times sigmoid(log-sum-exp of scores - s).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch, T query tokens, S key tokens, D head channels, H query heads, K key/value heads, G query heads a key head


def sdpa(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """torch's fused attention: [B, T, H, D] in and out, query heads grouped over K."""
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
    )
    return out_BHTD.transpose(1, 2)


def eager(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    heat_BT: Tensor | None = None,
) -> Tensor:
    """The formula with all scores at once, float32 from the scores to the weights: the reference."""
    q_BTKGD = q_BTHD.unflatten(2, (k_BSKD.shape[2], -1))
    score_BKGTS = torch.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD).float()
    score_BKGTS = score_BKGTS * (q_BTHD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        score_BKGTS = softcap * torch.tanh(score_BKGTS / softcap)
    if heat_BT is not None:
        score_BKGTS = score_BKGTS * heat_BT[:, None, None, :, None]
    if is_causal:
        mask = torch.ones(score_BKGTS.shape[-2:], dtype=torch.bool, device=q_BTHD.device).tril()[None, None]
    if mask is not None:
        score_BKGTS = score_BKGTS.masked_fill(~mask[:, :, None], float("-inf"))
    if sinks_H is not None:
        sink_KG11 = sinks_H.float().view(*q_BTKGD.shape[2:4], 1, 1)
        score_BKGTS = torch.cat((score_BKGTS, sink_KG11.expand_as(score_BKGTS[..., :1])), dim=-1)
    weight_BKGTS = score_BKGTS.softmax(-1)[..., : k_BSKD.shape[1]].to(v_BSKD.dtype)
    return torch.einsum("bkgts,bskd->btkgd", weight_BKGTS, v_BSKD).flatten(2, 3)


def flex(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    heat_BT: Tensor | None = None,
) -> Tensor:
    """The same in one generated kernel that keeps no scores; masked ones are computed all the same."""
    from torch.nn.attention.flex_attention import AuxRequest

    def score_mod(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if heat_BT is not None:
            score = score * heat_BT[b, t]
        if mask is not None:
            row = b if len(mask) > 1 else torch.zeros_like(b)
            return torch.where(mask[row, 0, t, s], score, float("-inf"))
        return torch.where(t >= s, score, float("-inf")) if is_causal else score

    out_BHTD, aux = _flex_attention()(
        q_BTHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        score_mod=score_mod,
        scale=scale,
        enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    if sinks_H is not None:
        share_BHT = torch.sigmoid(aux.lse - sinks_H.float()[:, None])
        out_BHTD = out_BHTD * share_BHT[..., None].to(out_BHTD.dtype)
    return out_BHTD.transpose(1, 2)


@cache
def _flex_attention() -> Callable[..., Any]:
    """Compiled on a GPU, where it would otherwise keep all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention) if torch.cuda.is_available() else attention
