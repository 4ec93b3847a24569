"""What rooms hand to each other, as plain data: so parallelisms, checkpoint and inference know no family by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanovl.config.schema import OptimizerGroup

IGNORE_INDEX = -100
"""Target that carries no loss."""

Batch = dict[str, Tensor]
"""Rows of one rank: tokens_BT, targets_BT (IGNORE_INDEX = none), positions_BT (restart with each document),
doc_ids_BT (attention stays inside one), all int64, and weights_BT, float32 loss weights."""


class ModelConfig(Protocol):
    """What every family's config can say of itself."""

    vocab_size: int

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...


@dataclass(frozen=True)
class KeyRule:
    """One line of a key map: how a tensor is named by Hugging Face and by us.

    `theirs` and `ours` are names with `{i}` for the layer number. `to_ours` and `to_theirs` convert the values where
    the layout differs (exact inverses); None = as it is.
    """

    theirs: str
    ours: str
    to_ours: Callable[[Tensor], Tensor] | None = None
    to_theirs: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class HuggingFaceSpec:
    """How a family's checkpoints look to `transformers`."""

    architecture: str
    """Class name in config.json, such as `Qwen3ForCausalLM`."""
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    key_rules: Callable[[Any], list[KeyRule]]
    """The key map of one config; tied weights are listed once, under the name on disk."""


@dataclass(frozen=True)
class ModelFamily:
    """One entry of the registry, written at the end of each family's file."""

    name: str
    summary: str
    """One line: what the architecture is known by."""
    config: type[Any]
    """Dataclass that holds every constant of the architecture."""
    flavors: Mapping[str, Callable[[], Any]]
    """Named sizes; the first is the default. Each call makes a fresh config."""
    model: Callable[[Any], Model]
    """Builds the module from its config, on whatever device is current."""
    optimizer_groups: Callable[[Any], list[OptimizerGroup]]
    """Parameter groups used where the job names none."""
    hf: HuggingFaceSpec | None = None
    """None where transformers has no such class."""


@dataclass(frozen=True)
class ModelSpec:
    """A resolved choice of architecture: the family and the config with the job's overrides in it."""

    family: ModelFamily
    config: Any
    flavor: str = field(default="")


class Model(nn.Module, ABC):
    """What the trainer and the engine ask of a model. A family writes `hidden` and how its weights begin."""

    config: Any
    layers: nn.ModuleDict
    lm_head: nn.Module

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        *,
        objective: Callable[[Any, Tensor], Any] | None = None,
    ) -> Any:
        """Float32 logits [B, T, V], or what `objective(head, hidden_BTD)` returns.

        So the loss runs inside forward, where FSDP has gathered the head's weight, and logits need not exist all at
        once. Without positions a row counts from 0; without document ids it is one document.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x_BTD = self.hidden(tokens_BT, positions_BT, doc_ids_BT)
        return self.lm_head(x_BTD) if objective is None else objective(self.lm_head, x_BTD)

    def blocks(self) -> list[nn.Module]:
        """The layers, in order: the units of FSDP, compile and activation checkpointing."""
        return list(self.layers.values())

    def init_buffers(self, device: torch.device) -> None:
        """Compute every buffer anew on `device`, needed after to_empty; a family without buffers has nothing to do."""

    @abstractmethod
    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        """Tokens -> the states [B, T, D] that the head reads."""

    @abstractmethod
    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Fill `full`, the whole unsharded parameter `name`, from `generator` alone."""

    @abstractmethod
    def forward_flops_per_token(self, mean_keys: Callable[[int | None], float]) -> float:
        """Forward FLOPs of one token (2 a multiply-add); `mean_keys(window)` = keys a query sees on average."""
