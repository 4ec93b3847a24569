"""Muon as nanochat runs it (July 2026): one optimizer for plain and for sharded matrices.

    b     <- b + (1 - mu) (g - b)                      momentum
    u      = g + mu (b - g)                            Nesterov
    x, v  <- direction(u, v)                           optim/orthogonalize.py
    lr'    = lr sqrt(max(1, rows / cols))
    p     <- p - lr' x - lr' wd p [x p >= 0]           cautious weight decay, arXiv:2510.12402

b and v are sharded as the parameter is, so they are saved and loaded on any mesh; only u travels, see
gather.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanovl.config import schema
from nanovl.optim.gather import Exchange, Groups, Layout, local_of
from nanovl.optim.orthogonalize import direction, second_dim

STACK_ELEMENTS = 2**27
"""Most numbers a rank works on at once, unless one matrix has more: half a gigabyte a float32 copy."""


class Muon(torch.optim.Optimizer):
    """For parameters of two or more dimensions: the last two are the matrix, those before count matrices.

    Param groups hold `lr`, `momentum`, `weight_decay` and `beta2` (NorMuon's); the rest is fixed by `config`.
    Parameters without a gradient are passed over: all ranks must agree on which, as FSDP sees to.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        config: schema.Muon,
        *,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        beta2: float = 0.9,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": config.momentum, "weight_decay": weight_decay, "beta2": beta2}
        super().__init__(params, defaults)
        self.config = config
        self.compute_dtype = compute_dtype
        self.exchanges: dict[Layout, Exchange] = {}
        groups = Groups()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            assert parameter.ndim >= 2, "Muon takes matrices only; groups.assign says which"
            layout = Layout.of(parameter)
            if layout not in self.exchanges:
                side = [_second_layout(layout)] if config.variance_reduction else []
                self.exchanges[layout] = Exchange([layout, *side], groups)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make every parameter's state now, so that a checkpoint can be loaded before the first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "no closure: the trainer runs backward itself"
        turn = 0
        for group in self.param_groups:
            for layout, parameters in _alike(p for p in group["params"] if p.grad is not None):
                for stack in _stacks(layout, parameters):
                    self._update(layout, stack, group, turn)
                    turn += len(stack) * layout.shape[:-2].numel()

    def _update(
        self, layout: Layout, parameters: list[nn.Parameter], group: dict[str, Any], turn: int
    ) -> None:
        states = [self._state_of(p) for p in parameters]
        momenta = [local_of(state["momentum_buffer"]) for state in states]
        gradients = [_local_gradient(p) for p in parameters]
        for momentum, gradient in zip(momenta, gradients, strict=True):
            momentum.lerp_(gradient, 1 - group["momentum"])
        pairs = zip(gradients, momenta, strict=True)
        nesterov = torch.stack([gradient.lerp(momentum, group["momentum"]) for gradient, momentum in pairs])
        memories = (
            [local_of(s["second_momentum_buffer"]) for s in states] if self.config.variance_reduction else []
        )

        def whole(stacks: list[Tensor]) -> list[Tensor]:
            before = stacks[1] if memories else None
            update, after = direction(stacks[0], before, self.config, group["beta2"], self.compute_dtype)
            return [update] if after is None else [update, after]

        stacks = [nesterov, torch.stack(memories)] if memories else [nesterov]
        updates, *new = self.exchanges[layout](whole, stacks, turn)
        for memory, value in zip(memories, new[0] if new else (), strict=True):
            memory.copy_(value)
        rows, cols = layout.shape[-2:]
        lr = group["lr"] * max(1.0, rows / cols) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            self._apply(local_of(parameter), update, lr, group["weight_decay"])

    def _apply(self, parameter: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
        if weight_decay:
            decay = parameter * (update * parameter >= 0) if self.config.cautious_weight_decay else parameter
            update = update.add(decay, alpha=weight_decay)
        parameter.sub_(update, alpha=lr)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            layout, local = Layout.of(parameter), local_of(parameter)
            state["momentum_buffer"] = layout.wrap(torch.zeros_like(local))
            if self.config.variance_reduction:
                dim = second_dim(*layout.shape[-2:])
                shape = [1 if i - local.ndim == dim else size for i, size in enumerate(local.shape)]
                state["second_momentum_buffer"] = _second_layout(layout).wrap(local.new_zeros(shape))
        return state


def _second_layout(layout: Layout) -> Layout:
    return layout.without(second_dim(*layout.shape[-2:]))


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of the gradient, cut as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    layout = Layout.of(parameter)
    if isinstance(gradient, DTensor) and Layout.of(gradient) != layout:
        gradient = gradient.redistribute(layout.mesh, layout.placements)
    return local_of(gradient)


def _alike(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[Layout, list[nn.Parameter]]]:
    """Parameters of one shape, cut one way, that can be stacked; in the order of the first of each kind."""
    kinds: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((Layout.of(parameter), parameter.dtype, parameter.device), []).append(parameter)
    for (layout, *_), alike in kinds.items():
        yield layout, alike


def _stacks(layout: Layout, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Cut a long list, at multiples of the ranks that share the work."""
    ranks = 1 if layout.mesh is None else layout.mesh.size()
    together = ranks * max(1, STACK_ELEMENTS // layout.shape.numel())
    for start in range(0, len(parameters), together):
        yield parameters[start : start + together]
