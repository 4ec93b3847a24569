"""A model cut over the ranks of a mesh: what the trainer, evaluation and checkpoints hold on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nanovl.mesh import Mesh
from nanovl.parallelisms.context_cut import SequenceCut
from nanovl.parallelisms.local_views import sum_copies
from nanovl.parallelisms.pipeline import Pipeline
from nanovl.spec import Batch, Model, run_batch

# B rows, T tokens, D model

Objective = Callable[..., Any]
"""(head, hidden states [B, T, D], the batch they were made of) -> result; tokens are those of this rank. For a batch
with `ahead_BTU` the states of each depth of multi-token prediction follow."""


@dataclass
class ParallelModel:
    """The layers this rank runs, and how a batch goes through all ranks' layers.

    All ranks of a mesh make the same calls in the same order.
    """

    parts: list[Model]
    """Pipeline stages of this rank, in order; one where there is no pipeline."""
    mesh: Mesh
    sequence: SequenceCut
    """Which tokens of a row are this rank's."""
    pipeline: Pipeline | None = None
    reduce_last_only: bool = False
    """Sum gradients over data ranks after the last micro-batch only."""
    elsewhere: frozenset[str] = frozenset()
    """Parameters here that are copies of another stage's: tied weights."""
    whole: nn.Module = field(init=False)
    """All parts under the names of one model; the model itself where there is one part."""

    def __post_init__(self) -> None:
        self.whole = self.parts[0] if len(self.parts) == 1 else _joined(self.parts)

    @property
    def config(self) -> Any:
        """The architecture's config."""
        return self.parts[0].config

    @property
    def device(self) -> torch.device:
        return next(self.whole.parameters()).device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, under the names of the whole model."""
        return self.whole.named_parameters()

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of all parts."""
        for part in self.parts:
            part.train(mode)

    def backward(self, batches: Sequence[Batch], objective: Objective, *, documents: bool = True) -> Tensor:
        """Forward and backward of all micro-batches, whole rows each; `objective` returns a loss, or several that are
        trained by their sum.

        Returns them added up over this rank's micro-batches: one 0 where another stage computes them. Gradients add up
        in the parameters, which have none before: one call is one step. `documents` = attention stays inside a
        document.
        """
        batches = [self.sequence.cut(batch) for batch in batches]
        if self.pipeline is not None:
            total = self.pipeline.backward(batches, objective, documents)
        else:
            total = self._backward(batches, objective, documents)
        self.sum_copies()
        return total

    def sum_copies(self) -> None:
        """The last part of backward: gradients of what every tensor rank has whole."""
        group = self.mesh.group("tp")
        if group is not None:
            sum_copies(self.whole.parameters(), "tp", group)

    def _backward(self, batches: Sequence[Batch], objective: Objective, documents: bool) -> Tensor:
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            self._sync_gradients(i == len(batches) - 1)
            losses = run_batch(self.parts[0], batch, objective, documents=documents)
            losses.sum().backward()
            total = total + losses.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective, *, documents: bool = True) -> Any:
        """What `objective` returns for this rank's tokens of `batch`, of any shape; None where another stage has it."""
        batch = self.sequence.cut(batch)
        if self.pipeline is not None:
            return self.pipeline.evaluate(batch, objective, documents)
        return run_batch(self.parts[0], batch, objective, documents=documents)

    def _sync_gradients(self, last: bool) -> None:
        if self.reduce_last_only:
            for part in self.parts:
                assert isinstance(part, FSDPModule)
                part.set_requires_gradient_sync(last)


def _joined(parts: Sequence[Model]) -> nn.Module:
    """One module of all parts. Of a tied weight that is here twice it has the first's; the pipeline keeps the other."""
    whole = nn.Module()
    layers: dict[str, nn.Module] = {}
    for part in parts:
        layers.update(part.layers.items())
        children = {name: child for name, child in part.named_children() if name != "layers"}
        copies = {
            id(p) for name, child in children.items() if hasattr(whole, name) for p in child.parameters()
        }
        for name, child in children.items():
            if any(id(parameter) not in copies for parameter in child.parameters()):
                whole.add_module(name, child)
    whole.add_module("layers", nn.ModuleDict(layers))
    return whole
