"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.spec import Cut, TensorPlan

# B batch, T tokens, D model, F ffn


Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglu_clamped"]


@dataclass(kw_only=True)
class MlpConfig:
    kind: Literal["mlp"] = "mlp"
    """Tells it from a `moe`."""
    intermediate_size: int
    """Width between the projections."""
    activation: Activation = "silu"
    """SiLU, GELU exact or by tanh (arXiv:1606.08415), squared ReLU (arXiv:2109.08668), or GPT-OSS's clamped SwiGLU,
    which is gated: see `swiglu_clamped` in models/blocks/mlp.py."""
    gated: bool = True
    """act(gate(x)) * up(x) (SwiGLU, GeGLU, arXiv:2002.05202) instead of act(up(x))."""
    bias: bool = False
    """Biases of all projections."""

    def mistakes(self) -> list[str]:
        """What does not fit together, as `key = value: wanted`."""
        wrong = []
        if self.intermediate_size < 1:
            wrong.append(f"intermediate_size = {self.intermediate_size}: wants a number above 0")
        if self.activation == "swiglu_clamped" and not self.gated:
            wrong.append("gated = false: swiglu_clamped is a gate; choose another activation")
        return wrong


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
}


def swiglu_clamped(gate: Tensor, up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """g sigmoid(alpha g) (u + 1) with g = min(gate, limit) and u = up within +-limit (GPT-OSS, arXiv:2508.10925)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def activated(activation: Activation, up: Tensor, gate: Tensor | None) -> Tensor:
    """What down_proj reads: act(gate) * up, or act(up) without a gate."""
    if gate is None:
        return ACTIVATIONS[activation](up)
    return swiglu_clamped(gate, up) if activation == "swiglu_clamped" else ACTIVATIONS[activation](gate) * up


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: MlpConfig, hidden_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        inner, bias = config.intermediate_size, config.bias
        self.gate_proj = nn.Linear(hidden_size, inner, bias) if config.gated else None
        self.up_proj = nn.Linear(hidden_size, inner, bias)
        self.down_proj = nn.Linear(inner, hidden_size, bias)

    def tensor_plan(self) -> TensorPlan:
        """Inner channels apart."""
        width = self.up_proj.out_features
        cuts = {"up_proj": Cut("column", width), "down_proj": Cut("row", width)}
        if self.gate_proj is not None:
            cuts["gate_proj"] = Cut("column", width)
        return TensorPlan(cuts, gathers=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF = None if self.gate_proj is None else self.gate_proj(x_BTD)
        return self.down_proj(activated(self.activation, self.up_proj(x_BTD), gate_BTF))
