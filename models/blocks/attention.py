"""Grouped-query attention around one replaceable child, `core`.

The projections, norms and rotation belong to the model; what happens between q, k, v and the output belongs to `core`.
Training uses `AttentionCore`; the engine puts a cached one in its place, and so does context parallelism: nothing
else of a model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanovl.errors import ConfigError
from nanovl.models.blocks import kernels
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.models.blocks.rope import RopeConfig, apply_rope, rope_tables
from nanovl.spec import FREE, Cut, TensorPlan

# B batch, T query tokens, S key tokens, D head channels (model channels in x), H query heads, K key/value heads

RopeKey = tuple[RopeConfig, int]
"""A rotation and the head width it turns: layers with equal keys share their tables."""

Kernel = Literal["auto", "sdpa", "eager", "flex", "varlen"]


@dataclass(kw_only=True)
class AttentionConfig:
    kind: Literal["attention"] = "attention"
    """Tells it from other mixers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; each serves num_attention_heads / num_key_value_heads query heads (arXiv:2305.13245)."""
    head_dim: int
    """Channels a head."""
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    """Rotary embedding; none = no positions at all (NoPE)."""
    sliding_window: int | None = None
    """Keys a query sees, itself included; none = all."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of every query and key head (`head`), or of all heads together (`full`, before the rotation)."""
    qk_norm_after_rope: bool = False
    """Norm after the rotation instead of before."""
    qk_norm_weight: bool = True
    """A learned scale in that norm."""
    qkv_bias: bool = False
    """Biases of the q, k and v projections."""
    o_bias: bool = False
    """Bias of the output projection."""
    query_pre_attn_scalar: int | None = None
    """Scores are q k / sqrt(this); none = head_dim."""
    attn_logit_softcapping: float | None = None
    """Scores become cap * tanh(scores / cap)."""
    attn_temperature_len: int | None = None
    """Scores of queries past this place of their document are multiplied by log(place) / log(this), after the cap
    (Grok-2); none = never."""
    sinks: bool = False
    """A learned score for each query head that takes its share of the softmax and gives no value (GPT-OSS)."""
    output_gate: bool = False
    """Every channel of the heads' outputs times a sigmoid of its own, sigmoid(g_proj(x)) (arXiv:2505.06708)."""
    kernel: Kernel = field(default="auto", metadata=FREE)
    """`sdpa`: torch's fused attention, without cap and sinks; `eager`: the formula, all scores in memory; `flex`:
    FlexAttention, GPU only; `varlen`: fused attention document by document, without masks, cap and sinks, GPU only;
    `auto`: sdpa where it can, else flex on a GPU and eager elsewhere."""

    def mistakes(self) -> list[str]:
        """What does not fit together, as `key = value: wanted`."""
        wrong = []
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads <= 0 or heads % kv_heads:
            wrong.append(
                f"num_key_value_heads = {kv_heads}: wants a divisor of num_attention_heads = {heads}"
            )
        if self.head_dim <= 0 or self.head_dim % 2:
            wrong.append(f"head_dim = {self.head_dim}: wants an even number above 0")
        if self.qk_norm == "full" and self.qk_norm_after_rope:
            wrong.append("qk_norm_after_rope = true: a norm of all heads together comes before the rotation")
        if self.sliding_window is not None and self.sliding_window < 1:
            wrong.append(f"sliding_window = {self.sliding_window}: wants 1 or more (1 = only itself)")
        for key in ("query_pre_attn_scalar", "attn_logit_softcapping"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                wrong.append(f"{key} = {value}: wants a number above 0, or none")
        if self.attn_temperature_len is not None and self.attn_temperature_len < 2:
            wrong.append(f"attn_temperature_len = {self.attn_temperature_len}: wants 2 or more, or none")
        if self.kernel in ("sdpa", "varlen") and (self.sinks or self.attn_logit_softcapping is not None):
            wrong.append(f"kernel = {self.kernel!r}: has neither cap nor sinks; choose auto, eager or flex")
        wrong += kernels.varlen_mistakes(self.kernel, self.head_dim, self.head_dim)
        if self.rope is not None:
            wrong += [f"rope.{m}" for m in self.rope.mistakes(self.head_dim)]
        return wrong

    @property
    def scores(self) -> Scores:
        """How queries and keys become weights."""
        scalar = self.query_pre_attn_scalar or self.head_dim
        return Scores(
            scalar**-0.5, self.attn_logit_softcapping, self.sinks, self.kernel, self.attn_temperature_len
        )


@dataclass(frozen=True)
class Scores:
    """How queries and keys become weights, and who computes it."""

    scale: float | None = None
    """Factor on q k; None = head_dim^-0.5."""
    softcap: float | None = None
    sinks: bool = False
    kernel: Kernel = "auto"
    temperature_len: int | None = None

    def heat(self, positions_BT: Tensor) -> Tensor | None:
        """Factors [B, T] float32 on the scores of queries at these places of their documents; None = 1 everywhere."""
        if self.temperature_len is None:
            return None
        return positions_BT.float().clamp(min=self.temperature_len).log() / log(self.temperature_len)

    @property
    def beyond_sdpa(self) -> bool:
        """torch's fused attention cannot do it."""
        return self.softcap is not None or self.sinks

    @property
    def uncompiled(self) -> Scores:
        """The same for calls of ever new lengths, each of which FlexAttention would compile for, and with masks."""
        return replace(self, kernel="eager" if self.beyond_sdpa or self.kernel == "eager" else "sdpa")


@dataclass
class AttentionMeta:
    """What all layers of one forward share; built once, so that masks and rotation tables are too."""

    positions_BT: Tensor
    """Place of every token in its document."""
    masks: dict[int | None, Tensor | None]
    """By window: True where a query may look, [B or 1, 1, T, T]; None = plainly causal."""
    rope: dict[RopeKey, tuple[Tensor, Tensor]]
    document_starts: Tensor | None = None
    """First tokens of all documents of the batch, row after row, and its end, int32; None = no kernel asks."""

    @staticmethod
    def build(
        positions_BT: Tensor,
        doc_ids_BT: Tensor | None,
        windows: Iterable[int | None],
        ropes: Iterable[RopeKey],
    ) -> AttentionMeta:
        """Masks for `windows` and tables for `ropes`; without `doc_ids_BT` a row is one document."""
        return AttentionMeta(
            positions_BT,
            {w: visible(positions_BT.shape[1], w, doc_ids_BT, positions_BT.device) for w in set(windows)},
            {(rope, head_dim): rope_tables(rope, head_dim, positions_BT) for rope, head_dim in set(ropes)},
        )


def visible(
    num_tokens: int, window: int | None, doc_ids_BT: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys each query may see: itself and earlier ones, in window and document. None = causal alone."""
    windowed = window is not None and window < num_tokens
    if doc_ids_BT is None and not windowed:
        return None
    index_T = torch.arange(num_tokens, device=device)
    distance_TT = index_T[:, None] - index_T[None, :]
    mask = (distance_TT >= 0)[None, None]
    if window is not None and windowed:
        mask = mask & (distance_TT < window)
    if doc_ids_BT is not None:
        mask = mask & (doc_ids_BT[:, None, :, None] == doc_ids_BT[:, None, None, :])
    return mask


class MetaBuilder(nn.Module):
    """Builds what the attention layers of a model share. A child of the model, like `core` of a layer: whoever cuts
    the sequence puts another one in its place."""

    def __init__(self, layers: Iterable[Any]) -> None:
        """`layers` have a `core`, a `rope_key` and a `config` with a `sliding_window`."""
        super().__init__()
        mixers = list(layers)
        masked = [m for m in mixers if m.core.scores.kernel != "varlen"]
        self.windows = {m.config.sliding_window for m in masked}
        self.finds_documents = len(masked) < len(mixers)
        self.ropes = {m.rope_key for m in mixers if m.rope_key is not None}

    def forward(self, positions_BT: Tensor, doc_ids_BT: Tensor | None) -> AttentionMeta:
        meta = AttentionMeta.build(positions_BT, doc_ids_BT, self.windows, self.ropes)
        if self.finds_documents:
            meta.document_starts = kernels.starts_of_documents(positions_BT, doc_ids_BT)
        return meta


class AttentionCore(nn.Module):
    """softmax(scale q k^T) v over the keys that the mask shows."""

    def __init__(
        self,
        window: int | None,
        num_key_value_heads: int,
        head_dim: int,
        scores: Scores = Scores(),
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.scores = scores

    def forward(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        meta: AttentionMeta,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """-> [B, T, H, D]."""
        heat_BT = self.scores.heat(meta.positions_BT)
        if self.scores.kernel == "varlen":
            assert meta.document_starts is not None
            return kernels.varlen(
                kernels.heated(q_BTHD, heat_BT),
                k_BTKD,
                v_BTKD,
                meta.document_starts,
                self.window,
                self.scores.scale,
            )
        mask = meta.masks[self.window]
        return attend(
            q_BTHD,
            k_BTKD,
            v_BTKD,
            mask,
            is_causal=mask is None,
            scores=self.scores,
            sinks_H=sinks_H,
            heat_BT=heat_BT,
        )


def attend(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
    scores: Scores = Scores(),
    sinks_H: Tensor | None = None,
    heat_BT: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, [B, T, H, D] in and out, by the kernel that `scores` chooses; `mask` is True where a
    query may look, [B or 1, 1, T, S]; `heat_BT` is that of `scores` for these queries."""
    assert scores.sinks == (sinks_H is not None)
    assert (scores.temperature_len is None) == (heat_BT is None)
    assert scores.kernel != "varlen", "it knows documents and windows, but no masks"
    kernel = scores.kernel
    if kernel == "auto":
        kernel = "sdpa" if not scores.beyond_sdpa else "flex" if q_BTHD.is_cuda else "eager"
    if kernel == "sdpa":
        return kernels.sdpa(kernels.heated(q_BTHD, heat_BT), k_BSKD, v_BSKD, mask, is_causal, scores.scale)
    compute = kernels.flex if kernel == "flex" else kernels.eager
    return compute(q_BTHD, k_BSKD, v_BSKD, mask, is_causal, scores.scale, scores.softcap, sinks_H, heat_BT)


class Attention(nn.Module):
    """o(core(q, k, v)), with optional norms and rotation of q and k, and gate of the output."""

    def __init__(self, config: AttentionConfig, hidden_size: int, norm: NormConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=config.o_bias)
        self.g_proj = (
            nn.Linear(hidden_size, heads * head_dim, bias=config.qkv_bias) if config.output_gate else None
        )
        self.q_norm, self.k_norm = (_qk_norm(config, n, norm) for n in (heads, kv_heads))
        self.sinks = nn.Parameter(torch.empty(heads)) if config.sinks else None
        self.core = AttentionCore(config.sliding_window, kv_heads, head_dim, config.scores)

    @property
    def rope_key(self) -> RopeKey | None:
        return None if self.config.rope is None else (self.config.rope, self.config.head_dim)

    def score_flops(self, mean_keys: Callable[[int | None], float]) -> float:
        """Forward FLOPs of one token between q, k, v and the output: 2 H (d_qk + d_v) keys."""
        config = self.config
        return 2.0 * config.num_attention_heads * 2 * config.head_dim * mean_keys(config.sliding_window)

    def tensor_plan(self) -> TensorPlan:
        """Heads apart."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        cuts = {
            "q_proj": Cut("column", heads),
            "k_proj": Cut("column", kv_heads),
            "v_proj": Cut("column", kv_heads),
            "o_proj": Cut("row", heads),
        }
        if self.config.qk_norm == "full":
            cuts |= {"q_norm": Cut("width", heads), "k_norm": Cut("width", kv_heads)}
        if self.sinks is not None:
            cuts["sinks"] = Cut("heads", heads)
        if self.g_proj is not None:
            cuts["g_proj"] = Cut("column", heads)
        return TensorPlan(cuts, gathers=True)

    def row_factors(self, gamma_H: Tensor) -> dict[str, Tensor]:
        """Factors [H, rows] on each head's rows of projections, the queries' first, that make its scores gamma times as
        large. Where a key head serves several query heads, it stays as it is."""
        shared = self.config.num_key_value_heads != self.config.num_attention_heads
        factors_HD = (gamma_H if shared else gamma_H.sqrt())[:, None].expand(-1, self.config.head_dim)
        return {"q_proj": factors_HD} if shared else {"q_proj": factors_HD, "k_proj": factors_HD}

    def qkv(self, x_BTD: Tensor, meta: AttentionMeta) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D] and keys, normed and rotated, and values [B, T, K, D]."""
        split = (*x_BTD.shape[:2], -1, self.config.head_dim)
        q_BTD, k_BTD = self.q_proj(x_BTD), self.k_proj(x_BTD)
        if self.config.qk_norm == "full":
            q_BTD, k_BTD = self.q_norm(q_BTD), self.k_norm(k_BTD)
        q_BTHD, k_BTKD = q_BTD.view(split), k_BTD.view(split)
        if self.config.qk_norm == "head" and not self.config.qk_norm_after_rope:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if self.rope_key is not None:
            cos, sin = meta.rope[self.rope_key]
            q_BTHD, k_BTKD = apply_rope(q_BTHD, cos, sin), apply_rope(k_BTKD, cos, sin)
        if self.config.qk_norm == "head" and self.config.qk_norm_after_rope:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return q_BTHD, k_BTKD, self.v_proj(x_BTD).view(split)

    def forward(self, x_BTD: Tensor, meta: AttentionMeta) -> Tensor:
        sinks = {} if self.sinks is None else {"sinks_H": self.sinks}
        out_BTD = self.core(*self.qkv(x_BTD, meta), meta, **sinks).flatten(2)
        if self.g_proj is not None:
            out_BTD = out_BTD * self.g_proj(x_BTD).sigmoid()
        return self.o_proj(out_BTD)


def _qk_norm(config: AttentionConfig, heads: int, norm: NormConfig) -> nn.Module:
    if config.qk_norm == "none":
        return nn.Identity()
    learned = "ones" if norm.weight == "none" else norm.weight
    norm = replace(norm, weight=learned if config.qk_norm_weight else "none")
    return RMSNorm(config.head_dim * (heads if config.qk_norm == "full" else 1), norm)


def raise_if(mistakes: list[str]) -> None:
    """ConfigError with all mistakes, if any."""
    if mistakes:
        raise ConfigError(mistakes)
