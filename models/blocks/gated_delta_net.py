"""Gated DeltaNet (arXiv:2412.06464): a mixer whose memory is one matrix a head, however long the row.

Queries, keys and values go through a short causal convolution and SiLU; queries and keys are scaled to length 1. Each
head decays its matrix by e^g and corrects it by beta (delta_rule.py), from the token alone:

    g = -exp(A_log) softplus(a(x) + dt_bias)      beta = sigmoid(b(x))      out = o(w norm(S^T q) silu(z(x)))

Key heads serve several value heads each, as in grouped-query attention, but here it is keys and queries that are fewer.
Two children look at earlier tokens, `earlier` and `delta_rule`; the engine's remember. Both stop at a document's first
token, position 0, so packed documents equal separate ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.models.blocks.attention import AttentionMeta
from nanovl.models.blocks.delta_rule import DeltaRule
from nanovl.models.blocks.norm import NormConfig
from nanovl.spec import Cut, TensorPlan

# B batch, T tokens, D model, K key heads, H value heads, X key channels, Y value channels, J taps of the convolution,
# Z channels of the convolution = 2 K X + H Y


@dataclass(kw_only=True)
class GatedDeltaNetConfig:
    kind: Literal["gated_delta_net"] = "gated_delta_net"
    """Tells it from `attention`."""
    num_key_heads: int
    """Heads of queries and keys."""
    num_value_heads: int
    """Heads of values, memory, decay and correction; each key head serves num_value_heads / num_key_heads."""
    key_head_dim: int
    """Channels of a query and of a key."""
    value_head_dim: int
    """Channels of a value."""
    conv_kernel_size: int = 4
    """Tokens that the convolution sees, the token itself included."""

    def mistakes(self) -> list[str]:
        """What does not fit together, as `key = value: wanted`."""
        keys = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_size")
        wrong = [
            f"{key} = {getattr(self, key)}: wants a number above 0" for key in keys if getattr(self, key) < 1
        ]
        if not wrong and self.num_value_heads % self.num_key_heads:
            wrong.append(
                f"num_value_heads = {self.num_value_heads}: wants a multiple of num_key_heads = {self.num_key_heads}"
            )
        return wrong


class GatedDeltaNet(nn.Module):
    """Heads that each keep one matrix of what they have read."""

    def __init__(self, config: GatedDeltaNetConfig, hidden_size: int, norm: NormConfig) -> None:
        super().__init__()
        self.config = config
        heads, taps = config.num_value_heads, config.conv_kernel_size
        keys, values = config.num_key_heads * config.key_head_dim, heads * config.value_head_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.z_proj = nn.Linear(hidden_size, values, bias=False)
        self.a_proj = nn.Linear(hidden_size, heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, heads, bias=False)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.q_conv = nn.Parameter(torch.empty(keys, taps))
        self.k_conv = nn.Parameter(torch.empty(keys, taps))
        self.v_conv = nn.Parameter(torch.empty(values, taps))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.gated_norm = GatedNorm(config.value_head_dim, norm.eps)
        self.earlier = EarlierTokens(taps - 1, 2 * keys + values)
        self.delta_rule = DeltaRule(heads, config.key_head_dim, config.value_head_dim)

    def tensor_plan(self) -> TensorPlan:
        """Heads apart, value heads with their key heads, and with both their channels of the convolution."""
        key_heads, heads = self.config.num_key_heads, self.config.num_value_heads
        cuts = {name: Cut("column", key_heads) for name in ("q_proj", "k_proj")}
        cuts |= {name: Cut("column", heads) for name in ("v_proj", "z_proj", "a_proj", "b_proj")}
        cuts |= {name: Cut("heads", key_heads) for name in ("q_conv", "k_conv")}
        cuts |= {name: Cut("heads", heads) for name in ("v_conv", "A_log", "dt_bias")}
        return TensorPlan({**cuts, "o_proj": Cut("row", heads)}, gathers=True)

    def score_flops(self, mean_keys: Callable[[int | None], float]) -> float:
        """Forward FLOPs of one token between projections: the convolution, and of the rule what it says, decaying no
        more than remembering: recall, correct, read. Chunks compute more, to compute faster."""
        c = self.config
        keys, values = c.num_key_heads * c.key_head_dim, c.num_value_heads * c.value_head_dim
        return 2.0 * c.conv_kernel_size * (2 * keys + values) + 6.0 * values * c.key_head_dim

    def forward(self, x_BTD: Tensor, meta: AttentionMeta) -> Tensor:
        config = self.config
        qkv = (self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD))
        qkv_BTZ = causal_convolution(
            self.earlier(torch.cat(qkv, dim=-1)),
            torch.cat((self.q_conv, self.k_conv, self.v_conv)),
            meta.positions_BT,
        )
        q_BTZ, k_BTZ, v_BTZ = F.silu(qkv_BTZ).split([part.shape[-1] for part in qkv], dim=-1)
        v_BTHY = v_BTZ.unflatten(-1, (-1, config.value_head_dim))
        q_BTKX, k_BTKX = (unit_length(x.unflatten(-1, (-1, config.key_head_dim))) for x in (q_BTZ, k_BTZ))
        group = v_BTHY.shape[2] // k_BTKX.shape[2]
        q_BTHX, k_BTHX = (x.repeat_interleave(group, dim=2) for x in (q_BTKX, k_BTKX))
        g_BTH = -self.A_log.float().exp() * F.softplus(self.a_proj(x_BTD).float() + self.dt_bias.float())
        g_BTH = g_BTH.masked_fill((meta.positions_BT == 0)[..., None], float("-inf"))
        out_BTHY = self.delta_rule(
            q_BTHX * config.key_head_dim**-0.5, k_BTHX, v_BTHY, g_BTH, self.b_proj(x_BTD).sigmoid()
        )
        z_BTHY = self.z_proj(x_BTD).view_as(out_BTHY)
        return self.o_proj(self.gated_norm(out_BTHY.to(x_BTD.dtype), z_BTHY).flatten(2))


class EarlierTokens(nn.Module):
    """x with the `count` tokens before it in front, [B, count + T, Z]; a row starts behind zeros. A child of its layer,
    like `core` of attention: the engine puts one that remembers in its place."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.count = count
        self.channels = channels

    def forward(self, x_BTZ: Tensor) -> Tensor:
        return F.pad(x_BTZ, (0, 0, self.count, 0))


class GatedNorm(nn.Module):
    """w x / sqrt(mean(x^2) + eps) silu(z), rounded where transformers rounds: before w, and at the end."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTHY: Tensor, z_BTHY: Tensor) -> Tensor:
        normed_BTHY = self.weight * F.rms_norm(x_BTHY, (self.dim,), None, self.eps)
        return (normed_BTHY * F.silu(z_BTHY.float())).to(x_BTHY.dtype)


def causal_convolution(x_BSZ: Tensor, weight_ZJ: Tensor, positions_BT: Tensor) -> Tensor:
    """Each channel's own filter over the token and the J - 1 before it in its document, [B, T, Z].

    `x_BSZ` begins J - 1 tokens before the first position; the last tap weighs the token itself. Written out tap by tap,
    since torch's convolution knows no documents.
    """
    tokens, taps = positions_BT.shape[1], weight_ZJ.shape[1]
    out_BTZ = x_BSZ[:, taps - 1 :].float() * weight_ZJ[:, -1]
    for back in range(1, taps):
        inside_BT1 = (positions_BT >= back)[..., None]
        seen_BTZ = x_BSZ[:, taps - 1 - back : taps - 1 - back + tokens] * inside_BT1
        out_BTZ = out_BTZ + seen_BTZ.float() * weight_ZJ[:, -1 - back]
    return out_BTZ.to(x_BSZ.dtype)


def unit_length(x_BTKX: Tensor) -> Tensor:
    """x / |x| in float32, with 1e-6 added to |x|^2."""
    x_BTKX = x_BTKX.float()
    return x_BTKX * torch.rsqrt(x_BTKX.square().sum(-1, keepdim=True) + 1e-6)
