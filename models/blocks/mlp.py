"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

# B batch, T tokens, D model, F ffn


@dataclass(kw_only=True)
class MlpConfig:
    intermediate_size: int
    """Width between the projections."""
    activation: Literal["silu", "relu2"] = "silu"
    """SiLU, or squared ReLU (arXiv:2109.08668)."""
    gated: bool = True
    """act(gate(x)) * up(x) (SwiGLU, arXiv:2002.05202) instead of act(up(x))."""


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu2": relu2}


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: MlpConfig, hidden_size: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.gate_proj = (
            nn.Linear(hidden_size, config.intermediate_size, bias=False) if config.gated else None
        )
        self.up_proj = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.up_proj(x_BTD)
        inner_BTF = self.act(up_BTF) if self.gate_proj is None else self.act(self.gate_proj(x_BTD)) * up_BTF
        return self.down_proj(inner_BTF)
