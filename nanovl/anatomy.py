"""What a model is made of and what it costs, found out on the meta device: nothing is allocated.

Sizes are those of the modules, the optimizers and the engine's cache themselves, so they follow the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn

from nanovl.config.schema import LrSchedule, Optimizer, OptimizerGroup
from nanovl.flops import causal_keys, training_flops_per_token
from nanovl.inference.cache import KVCache
from nanovl.optim.build import Optimizers
from nanovl.spec import Model, ModelSpec, expert_layers


@dataclass(frozen=True)
class Part:
    """The layers of one template, or one child of the model beside them."""

    name: str
    layers: int
    """0 = beside them."""
    parameters: int
    """A tied weight counts in the first part that has it."""
    active: int
    """Without the experts that a token does not go through."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one token in a row of `context` tokens, one document, and what the row leaves in the engine's cache."""

    context: int
    forward: float
    training: float
    scores: float
    """Share of what grows with the context: between queries, keys and values."""
    cache_bytes: int


@dataclass(frozen=True)
class Anatomy:
    """One model."""

    spec: ModelSpec
    parts: list[Part]
    lookups: int
    """Parameters of tables that are only looked up: the input embedding, unless it is tied to the head."""
    optimizer_bytes: dict[str, int]
    """State by update rule, with float32 weights."""
    bytes_per_token: int
    """Keys and values in the engine's cache, bfloat16."""
    bytes_per_request: int
    """What layers keep of a request in a fixed size, in a bfloat16 model."""
    costs: list[Cost]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def active(self) -> int:
        """Parameters that a token goes through."""
        return sum(part.active for part in self.parts)


def anatomy(spec: ModelSpec, optimizer: Optimizer, contexts: Sequence[int]) -> Anatomy:
    """All of it, with the costs of rows of `contexts` tokens. An `optimizer` without groups takes the family's."""
    model = meta_model(spec)
    groups = optimizer.groups or spec.family.optimizer_groups(spec.config)
    optimizer_bytes = _optimizer_bytes(model, groups, optimizer)
    cache = KVCache(model.to(torch.bfloat16)).memory()
    return Anatomy(
        spec=spec,
        parts=parts_of(model),
        lookups=lookup_parameters(model),
        optimizer_bytes=optimizer_bytes,
        bytes_per_token=cache.bytes_per_token,
        bytes_per_request=cache.bytes_per_slot,
        costs=[
            _cost(model, n, n * cache.bytes_per_token + cache.bytes_per_slot) for n in dict.fromkeys(contexts)
        ],
    )


def meta_model(spec: ModelSpec) -> Model:
    with torch.device("meta"):
        return spec.family.model(spec.config)


def active_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters of `modules`, once each, without the experts that a token does not go through."""
    modules = list(modules)
    idle = 0
    for layer in (found for module in modules for found in expert_layers(module)):
        experts = sum(p.numel() for p in layer.experts.parameters())
        idle += experts - experts * layer.num_experts_per_tok // layer.num_experts
    return sum(p.numel() for p in _distinct(modules)) - idle


def lookup_parameters(model: Model) -> int:
    """Parameters of embedding tables that multiply nothing; one tied to the head does."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(table.numel() for table in tables - set(model.lm_head.parameters()))


def parts_of(model: Model) -> list[Part]:
    """What stands before the layers, each template's layers, and what stands behind, in the model's own order."""
    names: list[str] = model.config.layer_names()
    found: dict[str, tuple[int, list[nn.Module]]] = {}
    for name, child in model.named_children():
        if child is model.layers:
            for template in dict.fromkeys(names):
                blocks = [model.layers[str(i)] for i, taken in enumerate(names) if taken == template]
                found[template] = len(blocks), blocks
        else:
            found[name] = 0, [child]
    seen: set[nn.Parameter] = set()
    parts = []
    for name, (layers, modules) in found.items():
        again = sum(p.numel() for p in _distinct(modules) if p in seen)
        total = sum(p.numel() for p in _distinct(modules)) - again
        seen |= set(_distinct(modules))
        if total:
            parts.append(Part(name, layers, total, active_parameters(modules) - again))
    return parts


def compact(names: Sequence[str]) -> str:
    """A long list of layers in few words: `3 x dense, 58 x moe`, `8 x (3 x sliding, full)`."""

    def runs(part: Sequence[str]) -> str:
        lengths = [(name, len(list(run))) for name, run in groupby(part)]
        return ", ".join(name if n == 1 else f"{n} x {name}" for name, n in lengths)

    best = runs(names)
    for start in range(min(4, len(names))):
        for period in range(2, (len(names) - start) // 2 + 1):
            unit = list(names[start : start + period])
            times = 1
            while list(names[start + times * period : start + (times + 1) * period]) == unit:
                times += 1
            if times > 1:
                tail = names[start + times * period :]
                said = [runs(names[:start]), f"{times} x ({runs(unit)})", runs(tail)]
                best = min(best, ", ".join(part for part in said if part), key=len)
    return best


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def _optimizer_bytes(model: Model, groups: Sequence[OptimizerGroup], optimizer: Optimizer) -> dict[str, int]:
    built = Optimizers(
        model.named_parameters(),
        groups,
        replace(optimizer, implementation="foreach"),  # a fused one asks for a device
        LrSchedule(),
        steps=1,
    )
    return {
        type(rule).__name__: sum(value.nbytes for state in rule.state.values() for value in state.values())
        for rule in built.optimizers
    }


def _cost(model: Model, context: int, cache_bytes: int) -> Cost:
    seen = causal_keys(context)
    forward = model.forward_flops_per_token(seen)
    alone = model.forward_flops_per_token(lambda window: 0.0)
    training = training_flops_per_token(model, seen)
    return Cost(context, forward, training, 1 - alone / forward, cache_bytes)
