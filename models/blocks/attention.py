"""Grouped-query attention around one replaceable child, `core`.

The projections, norms and rotation belong to the model; what happens between q, k, v and the output belongs to `core`.
Training uses `AttentionCore`; the engine puts a cached one in its place, and so will context parallelism: nothing
else of a model changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.errors import ConfigError
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.models.blocks.rope import RopeConfig, apply_rope, rope_tables

# B batch, T query tokens, S key tokens, D head channels (model channels in x), H query heads, K key/value heads

RopeKey = tuple[RopeConfig, int]
"""A rotation and the head width it turns: layers with equal keys share their tables."""


@dataclass(kw_only=True)
class AttentionConfig:
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
    qk_norm: Literal["none", "head"] = "none"
    """RMS norm of every query and key head."""
    qk_norm_after_rope: bool = False
    """Norm after the rotation instead of before."""
    qk_norm_weight: bool = True
    """A learned scale in that norm."""
    qkv_bias: bool = False
    """Biases of the q, k and v projections."""

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
        if self.sliding_window is not None and self.sliding_window < 1:
            wrong.append(f"sliding_window = {self.sliding_window}: wants 1 or more (1 = only itself)")
        return wrong


@dataclass
class AttentionMeta:
    """What all layers of one forward share; built once, so that masks and rotation tables are too."""

    positions_BT: Tensor
    """Place of every token in its document."""
    masks: dict[int | None, Tensor | None]
    """By window: True where a query may look, [B or 1, 1, T, T]; None = plainly causal."""
    rope: dict[RopeKey, tuple[Tensor, Tensor]]

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


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(D)) v over the keys that the mask shows."""

    def __init__(self, window: int | None, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.window = window
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim

    def forward(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, meta: AttentionMeta) -> Tensor:
        """-> [B, T, H, D]."""
        mask = meta.masks[self.window]
        return attend(q_BTHD, k_BTKD, v_BTKD, mask, is_causal=mask is None)


def attend(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None, *, is_causal: bool = False
) -> Tensor:
    """torch's scaled dot-product attention in our layout: [B, T, H, D] in and out, query heads grouped over K."""
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
    )
    return out_BHTD.transpose(1, 2)


class Attention(nn.Module):
    """o(core(q, k, v)), with optional norms and rotation of q and k."""

    def __init__(self, config: AttentionConfig, hidden_size: int, norm: NormConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        qk_norm = NormConfig(eps=norm.eps, weight="ones" if config.qk_norm_weight else "none")
        self.q_norm = RMSNorm(head_dim, qk_norm) if config.qk_norm == "head" else nn.Identity()
        self.k_norm = RMSNorm(head_dim, qk_norm) if config.qk_norm == "head" else nn.Identity()
        self.core = AttentionCore(config.sliding_window, kv_heads, head_dim)

    @property
    def rope_key(self) -> RopeKey | None:
        return None if self.config.rope is None else (self.config.rope, self.config.head_dim)

    def qkv(self, x_BTD: Tensor, meta: AttentionMeta) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D] and keys, normed and rotated, and values [B, T, K, D]."""
        split = (*x_BTD.shape[:2], -1, self.config.head_dim)
        q_BTHD, k_BTKD = self.q_proj(x_BTD).view(split), self.k_proj(x_BTD).view(split)
        if not self.config.qk_norm_after_rope:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if self.rope_key is not None:
            cos, sin = meta.rope[self.rope_key]
            q_BTHD, k_BTKD = apply_rope(q_BTHD, cos, sin), apply_rope(k_BTKD, cos, sin)
        if self.config.qk_norm_after_rope:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return q_BTHD, k_BTKD, self.v_proj(x_BTD).view(split)

    def forward(self, x_BTD: Tensor, meta: AttentionMeta) -> Tensor:
        out_BTHD = self.core(*self.qkv(x_BTD, meta), meta)
        return self.o_proj(out_BTHD.flatten(2))


def raise_if(mistakes: list[str]) -> None:
    """ConfigError with all mistakes, if any."""
    if mistakes:
        raise ConfigError(mistakes)
