"""How weights begin: one axis for every composed decoder.

transformers, Llama, Qwen   the defaults
DeepSeek-V3                 std = 0.006
GPT-2, HF nanochat          outputs = "depth_scaled"
nanochat                    std = "fan_in", uniform = true, outputs = "zero", ffn_scale = 0.4,
                            embedding_std = 0.8, head_std = 0.001
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor


@dataclass(kw_only=True)
class InitConfig:
    std: float | Literal["fan_in"] = 0.02
    """Standard deviation of every matrix; `fan_in` = inputs^-0.5."""
    uniform: bool = False
    """Matrices of blocks drawn uniformly, with that deviation, instead of normally."""
    outputs: Literal["same", "depth_scaled", "zero"] = "same"
    """o_proj and down_proj, which write to the stream: like the other matrices, with std / sqrt(2 layers), or zero, so
    that each block starts as the identity."""
    ffn_scale: float = 1.0
    """Factor on the deviation of the matrices that read in the MLP: gate_proj and up_proj."""
    embedding_std: float | None = None
    """Standard deviation of the embedding; none = `std`, or 1 where that is `fan_in`."""
    head_std: float | None = None
    """Standard deviation of an untied head; none = `std`."""

    def mistakes(self) -> list[str]:
        """What cannot be, as `key = value: wanted`."""
        keys = ("std", "ffn_scale", "embedding_std", "head_std")
        return [
            f"{key} = {value}: wants 0 or more"
            for key in keys
            if isinstance(value := getattr(self, key), float) and value < 0
        ]


def initialize(
    config: InitConfig, name: str, full: Tensor, generator: torch.Generator, *, layers: int, norm_start: float
) -> None:
    """Fill the whole parameter `name` of a model of `layers`; biases and sinks with 0, norms with `norm_start`.

    Gated DeltaNet: decays e^(-A softplus(1)) at first, A uniform in 0.01 .. 16, as transformers and Mamba 2 begin.
    """
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    is_output = leaf in ("o_proj", "down_proj")
    if leaf == "A_log":
        full.uniform_(0.01, 16.0, generator=generator).log_()
    elif leaf in ("dt_bias", "gated_norm", "k_layer_norm"):
        full.fill_(1.0)
    elif leaf.endswith(("bias", "sinks")) or (is_output and config.outputs == "zero"):
        full.zero_()
    elif "norm" in leaf:
        full.fill_(norm_start)
    elif leaf == "embed_tokens":
        std = 1.0 if config.std == "fan_in" else config.std
        full.normal_(0.0, std if config.embedding_std is None else config.embedding_std, generator=generator)
    else:
        std = full.shape[-1] ** -0.5 if config.std == "fan_in" else config.std
        if leaf == "lm_head":
            full.normal_(0.0, std if config.head_std is None else config.head_std, generator=generator)
            return
        std *= config.ffn_scale if leaf in ("gate_proj", "up_proj") else 1.0
        std /= sqrt(2 * layers) if is_output and config.outputs == "depth_scaled" else 1.0
        if config.uniform:
            full.uniform_(-sqrt(3) * std, sqrt(3) * std, generator=generator)
        else:
            full.normal_(0.0, std, generator=generator)
