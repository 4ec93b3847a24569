"""Ways to compute softmax(q k^T) v: torch's fused attention over rows (`sdpa`) or over documents laid end to end
(`varlen`), the formula written out (`eager`), and FlexAttention (`flex`).

Fused attention is the fastest and knows neither a cap on scores nor sinks. With cap c, heat h of a query (1 unless
given) and sink s of a head:

    score_ts = h_t c tanh(scale q_t k_s / c),   weight_ts = exp(score_ts) / (exp(s) + sum_s' exp(score_ts'))

The sink is one more key of value 0, so the output is that without it times sigmoid(log-sum-exp of scores - s).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

# B batch, T query tokens, S key tokens, D head channels, H query heads, K key/value heads, G query heads a key head


def sdpa(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """torch's fused attention: [B, T, H, D] in and out, query heads grouped over K."""
    if mask is not None and q_BTHD.is_cuda and q_BTHD.requires_grad:
        # with a mask torch up to 2.13 groups heads in cuDNN alone; elsewhere it would keep all scores for backward
        groups = q_BTHD.shape[2] // k_BSKD.shape[2]
        k_BSKD, v_BSKD = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k_BSKD, v_BSKD))
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

    def score_mod(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if heat_BT is not None:
            score = score * heat_BT[b, t]
        if mask is not None:
            row = b if len(mask) > 1 else torch.zeros_like(b)
            return torch.where(mask[row, 0, t, s], score, float("-inf"))
        return torch.where(t >= s, score, float("-inf")) if is_causal else score

    out_BHTD, lse_BHT = fused_flex(
        q_BTHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2), score_mod, scale
    )
    if sinks_H is not None:
        share_BHT = torch.sigmoid(lse_BHT - sinks_H.float()[:, None])
        out_BHTD = out_BHTD * share_BHT[..., None].to(out_BHTD.dtype)
    return out_BHTD.transpose(1, 2)


def fused_flex(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    score_mod: Callable[..., Tensor],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """torch's FlexAttention: [B, H, T, D], and the log-sum-exp of scores [B, H, T], float32."""
    if has_torch_function((q_BHTD, k_BKSD, v_BKSD)):  # as in torch's own functions
        arguments = (q_BHTD, k_BKSD, v_BKSD, score_mod, scale)
        return handle_torch_function(fused_flex, arguments[:3], *arguments)
    from torch.nn.attention.flex_attention import AuxRequest

    out_BHTD, aux = _flex_attention()(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        score_mod=score_mod,
        scale=scale,
        enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out_BHTD, aux.lse


def varlen(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    document_starts: Tensor,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """torch's FlashAttention over the documents of all rows laid end to end: there is no mask, and nothing is computed
    between two documents or outside of the window. On a GPU, below float32.

    `document_starts` = the first tokens of the documents among all B*T, and B*T itself, int32.
    """
    from torch.nn.attention.varlen import varlen_attn

    attention: Callable[..., Any] = varlen_attn
    more: dict[str, Any] = {}
    if q_BTHD.shape[2] != k_BTKD.shape[2]:
        if "enable_gqa" in inspect.signature(attention).parameters:
            more["enable_gqa"] = True
        else:  # a torch that does not take it
            group = q_BTHD.shape[2] // k_BTKD.shape[2]
            k_BTKD, v_BTKD = (x.repeat_interleave(group, dim=2) for x in (k_BTKD, v_BTKD))
    longest = q_BTHD.shape[1]  # a bound: asking for the true one would wait for the GPU
    out_NHD: Tensor = attention(
        *(x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD)),
        document_starts,
        document_starts,
        longest,
        longest,
        scale=scale,
        # it counts the keys before a token, not the token itself
        window_size=(-1 if window is None else window - 1, 0),
        **more,
    )
    return out_NHD.unflatten(0, q_BTHD.shape[:2])


def varlen_mistakes(kernel: str, head_dim: int, value_dim: int) -> list[str]:
    """Why FlashAttention does not take such heads."""
    if kernel == "varlen" and (head_dim != value_dim or head_dim % 8 or head_dim > 256):
        return [
            f"kernel = 'varlen': wants keys and values of one width, a multiple of 8 up to 256, not {head_dim} and "
            f"{value_dim}; choose auto"
        ]
    return []


def starts_of_documents(positions_BT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
    """Where documents begin among the B*T tokens of all rows, and B*T, int32 [documents + 1]; rows without
    `doc_ids_BT` are one each."""
    starts_BT = torch.zeros_like(positions_BT, dtype=torch.bool)
    starts_BT[:, 0] = True
    if doc_ids_BT is not None:
        starts_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return F.pad(starts_BT.flatten().nonzero()[:, 0], (0, 1), value=starts_BT.numel()).int()


def heated(q_BTHD: Tensor, heat_BT: Tensor | None) -> Tensor:
    """Queries times their heat: where there is no cap, the same as scores times it."""
    return q_BTHD if heat_BT is None else (q_BTHD * heat_BT[..., None, None]).to(q_BTHD.dtype)


@cache
def _flex_attention() -> Callable[..., Any]:
    """Compiled on a GPU, where it would otherwise keep all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention) if torch.cuda.is_available() else attention
