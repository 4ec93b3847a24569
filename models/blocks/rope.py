"""Rotary position embedding (arXiv:2104.09864), split-half layout: channel i turns with channel i + dim/2.

Checkpoints that turn neighbouring channels instead are permuted when they are read, so there is one layout here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# B batch, T tokens, H heads, D head channels, F frequencies: 2F channels of a head turn


@dataclass(kw_only=True, frozen=True)
class RopeScaling:
    """Slower rotations for rows longer than those of pretraining."""

    kind: Literal["linear", "llama3", "yarn"]
    """Every frequency / factor (arXiv:2306.15595); only those that turn less than `low_freq_factor` times in the
    original context (Llama 3.1), or less than `beta_slow` times (YaRN, arXiv:2309.00071), with a ramp up to the
    unchanged ones."""
    factor: float
    """New context / original context."""
    original_max_position_embeddings: int = 8192
    """Context of pretraining, tokens; `llama3` and `yarn`."""
    low_freq_factor: float = 1.0
    """`llama3`: turns up to which a frequency is divided whole."""
    high_freq_factor: float = 4.0
    """`llama3`: turns from which it stays."""
    beta_fast: float = 32.0
    """`yarn`: turns from which a frequency stays."""
    beta_slow: float = 1.0
    """`yarn`: turns up to which it is divided whole."""
    truncate: bool = True
    """`yarn`: round the ends of the ramp to whole channels."""
    attention_factor: float | None = None
    """`yarn`: factor on cos and sin; none = from `mscale` and `mscale_all_dim`, else 0.1 ln(factor) + 1."""
    mscale: float | None = None
    """`yarn`: the factor is (0.1 mscale ln(factor) + 1) over the same of `mscale_all_dim`, if both are given."""
    mscale_all_dim: float | None = None
    """`yarn`: see `mscale`; latent attention also takes its softmax scale times the square of this one's term."""

    def mistakes(self) -> list[str]:
        """What does not fit together, as `key = value: wanted`."""
        wrong = []
        if self.factor < 1:
            wrong.append(f"factor = {self.factor}: wants 1 or more")
        if self.original_max_position_embeddings < 1:
            wrong.append(
                f"original_max_position_embeddings = {self.original_max_position_embeddings}: wants tokens above 0"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            wrong.append(f"high_freq_factor = {self.high_freq_factor}: wants more than low_freq_factor")
        return wrong


@dataclass(kw_only=True, frozen=True)
class RopeConfig:
    theta: float = 10_000.0
    """Base of the wavelengths; the longest is about 2 pi theta tokens."""
    partial_rotary_factor: float = 1.0
    """Share of a head's channels that turn, the first ones."""
    scaling: RopeScaling | None = None
    """For contexts longer than that of pretraining."""

    def rotated(self, head_dim: int) -> int:
        """Channels of a head that turn."""
        return int(head_dim * self.partial_rotary_factor)

    def mistakes(self, head_dim: int) -> list[str]:
        """What does not fit together, as `key = value: wanted`."""
        wrong = [] if self.scaling is None else [f"scaling.{m}" for m in self.scaling.mistakes()]
        if self.theta <= 1:
            wrong.append(f"theta = {self.theta}: wants more than 1")
        if (
            not 0 < self.partial_rotary_factor <= 1
            or self.rotated(head_dim) % 2
            or not self.rotated(head_dim)
        ):
            wrong.append(
                f"partial_rotary_factor = {self.partial_rotary_factor}: wants an even number of the "
                f"{head_dim} channels of a head"
            )
        return wrong


def inverse_frequencies(config: RopeConfig, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """theta^(-i/F) for i in 0..F, scaled, [F] float32; and the factor on cos and sin."""
    rotated = config.rotated(head_dim)
    exponent_F = torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated
    wavelength_F = config.theta**exponent_F  # over 2 pi
    scaling = config.scaling
    if scaling is None:
        return 1.0 / wavelength_F, 1.0
    if scaling.kind == "linear":
        return 1.0 / wavelength_F / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(scaling, 1.0 / wavelength_F), 1.0
    kept_F = 1 - _yarn_ramp(scaling, config.theta, rotated, device)
    frequency_F = 1.0 / (scaling.factor * wavelength_F) * (1 - kept_F) + 1.0 / wavelength_F * kept_F
    return frequency_F, yarn_factor(scaling)


def _llama3(scaling: RopeScaling, frequency_F: Tensor) -> Tensor:
    turns_F = scaling.original_max_position_embeddings / (2 * math.pi / frequency_F)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return (1 - kept_F) * frequency_F / scaling.factor + kept_F * frequency_F


def _yarn_ramp(scaling: RopeScaling, theta: float, rotated: int, device: torch.device) -> Tensor:
    """0 for frequencies that stay, 1 for those divided whole, [F]."""

    def channel(turns: float) -> float:
        """Where a frequency makes so many turns in the original context."""
        original = scaling.original_max_position_embeddings
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # so transformers bounds it, although only half as many frequencies exist
    first, last = max(first, 0), min(last, rotated - 1)
    channel_F = torch.arange(rotated // 2, device=device, dtype=torch.float32)
    return ((channel_F - first) / (last - first or 0.001)).clamp(0, 1)


def yarn_factor(scaling: RopeScaling) -> float:
    """What cos and sin are multiplied by: longer rows flatten the softmax, this sharpens it again."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpening(scaling.factor, scaling.mscale) / sharpening(scaling.factor, scaling.mscale_all_dim)
    return sharpening(scaling.factor)


def sharpening(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_tables(config: RopeConfig, head_dim: int, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each [B, T, 1, F] float32; made once a forward, shared by all layers."""
    frequency_F, factor = inverse_frequencies(config, head_dim, positions_BT.device)
    angles_BTF = positions_BT[..., None].float() * frequency_F
    return (angles_BTF.cos() * factor)[:, :, None], (angles_BTF.sin() * factor)[:, :, None]


def apply_rope(x_BTHD: Tensor, cos_BT1F: Tensor, sin_BT1F: Tensor) -> Tensor:
    """Turn each pair among the first 2F channels by its angle; float32 inside, the input's dtype outside."""
    rotated = 2 * cos_BT1F.shape[-1]
    a_BTHF, b_BTHF = x_BTHD[..., :rotated].chunk(2, dim=-1)
    turned_BTHD = torch.cat(
        (a_BTHF * cos_BT1F - b_BTHF * sin_BT1F, b_BTHF * cos_BT1F + a_BTHF * sin_BT1F), dim=-1
    )
    turned_BTHD = turned_BTHD.to(x_BTHD.dtype)
    if rotated == x_BTHD.shape[-1]:
        return turned_BTHD
    return torch.cat((turned_BTHD, x_BTHD[..., rotated:]), dim=-1)
