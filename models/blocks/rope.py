"""Rotary position embedding (arXiv:2104.09864), split-half layout: channel i turns with channel i + dim/2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# B batch, T tokens, H heads, D head channels, F frequencies = D/2


@dataclass(kw_only=True, frozen=True)
class RopeConfig:
    theta: float = 10_000.0
    """Base of the wavelengths; the longest is about 2 pi theta tokens."""


def inverse_frequencies(config: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """theta^(-2i/D) for i in 0..D/2, float32."""
    exponent_F = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return 1.0 / config.theta**exponent_F


def rope_tables(config: RopeConfig, head_dim: int, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each [B, T, 1, D/2] float32; made once a forward, shared by all layers."""
    angles_BTF = positions_BT[..., None].float() * inverse_frequencies(config, head_dim, positions_BT.device)
    return angles_BTF.cos()[:, :, None], angles_BTF.sin()[:, :, None]


def apply_rope(x_BTHD: Tensor, cos_BT1F: Tensor, sin_BT1F: Tensor) -> Tensor:
    """Rotate each channel pair by its angle; float32 inside, the input's dtype outside."""
    a_BTHF, b_BTHF = x_BTHD.chunk(2, dim=-1)
    rotated = (a_BTHF * cos_BT1F - b_BTHF * sin_BT1F, b_BTHF * cos_BT1F + a_BTHF * sin_BT1F)
    return torch.cat(rotated, dim=-1).to(x_BTHD.dtype)
