"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, T tokens, D model


@dataclass(kw_only=True)
class NormConfig:
    eps: float = 1e-6
    """Added to the mean square."""
    weight: Literal["ones", "zeros", "none"] = "ones"
    """Learned scale per channel that starts at one; the same less one, so that it starts at zero and decays to the
    identity (Gemma); or none at all."""
    cast_before_scale: bool = False
    """Round to the input's dtype before the scale of `ones` multiplies, as Llama does; differs below float32 only."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, computed in float32."""

    def __init__(self, dim: int, config: NormConfig) -> None:
        super().__init__()
        self.dim = dim
        self.eps = config.eps
        self.zero_centred = config.weight == "zeros"
        self.cast_before_scale = config.cast_before_scale
        start = 0.0 if self.zero_centred else 1.0
        self.weight = None if config.weight == "none" else nn.Parameter(torch.full((dim,), start))

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.zero_centred or self.cast_before_scale:
            return self.scaled(F.rms_norm(x_BTD.float(), (self.dim,), None, self.eps), x_BTD.dtype)
        return F.rms_norm(x_BTD, (self.dim,), self.weight, self.eps)

    def scaled(self, x32_BTD: Tensor, dtype: torch.dtype) -> Tensor:
        """Normed float32 values times the scale, in `dtype`."""
        if self.weight is None:
            return x32_BTD.to(dtype)
        if self.zero_centred:
            return (x32_BTD * (1 + self.weight.float())).to(dtype)
        if self.cast_before_scale:
            return x32_BTD.to(dtype) * self.weight
        return (x32_BTD * self.weight).to(dtype)
