"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn, ones

# B batch, T tokens, D model


@dataclass(kw_only=True)
class NormConfig:
    eps: float = 1e-6
    """Added to the mean square."""
    weight: Literal["ones", "none"] = "ones"
    """Learned scale per channel that starts at one, or none at all."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, dim: int, config: NormConfig) -> None:
        super().__init__()
        self.dim = dim
        self.eps = config.eps
        self.weight = nn.Parameter(ones(dim)) if config.weight == "ones" else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD, (self.dim,), self.weight, self.eps)
