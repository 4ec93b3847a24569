"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.spec import Cut, TensorPlan

# B batch, T tokens, D model, F ffn


Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]


@dataclass(kw_only=True)
class MlpConfig:
    kind: Literal["mlp"] = "mlp"
    """Tells it from a `moe`."""
    intermediate_size: int
    """Width between the projections."""
    activation: Activation = "silu"
    """SiLU, GELU exact or by tanh (arXiv:1606.08415), or squared ReLU (arXiv:2109.08668)."""
    gated: bool = True
    """act(gate(x)) * up(x) (SwiGLU, GeGLU, arXiv:2002.05202) instead of act(up(x))."""
    bias: bool = False
    """Biases of all projections."""


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
}


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: MlpConfig, hidden_size: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
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
        up_BTF = self.up_proj(x_BTD)
        inner_BTF = self.act(up_BTF) if self.gate_proj is None else self.act(self.gate_proj(x_BTD)) * up_BTF
        return self.down_proj(inner_BTF)
