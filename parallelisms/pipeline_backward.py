"""A stage's backward in two: gradients of its inputs first, on which another rank waits, and those of weights later.

A node of the autograd graph is on the path if it leads to an input. What a weight contributes enters the path at a few
nodes, for a linear layer at one: its product. The first half goes down the path and keeps the gradients that arrive
there; the second runs these nodes once more, now towards the weights. No node in between is run twice, and torch's own
accumulation adds up what is found, as it would in one backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


@dataclass
class WeightsLater:
    """What is left of a backward: runs once."""

    groups: list[Entries]
    outputs: Sequence[Tensor]
    """They hold the graph: in torch 2.11 a node of a custom function in Python's hands does not keep the node alive."""

    def run(self) -> None:
        """Add the weights' gradients to their .grad."""
        while self.groups:
            self.groups.pop().run()
        self.outputs = ()


@dataclass
class Entries:
    """Weights that enter the path at the same nodes, and the gradients that arrived there."""

    weights: set[Node]
    nodes: set[Node]
    arrived: dict[Node, tuple[Tensor | None, ...]] = field(default_factory=dict)

    def keep(self, node: Node) -> Any:
        """Watch the gradients that arrive at `node`."""

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            self.arrived[node] = grads

        return node.register_prehook(hook)

    def run(self) -> None:
        edges = [
            (GradientEdge(node, i), grad)
            for node, grads in self.arrived.items()
            for i, grad in enumerate(grads)
            if grad is not None
        ]
        if not edges:
            return
        handles = []
        if len(self.nodes) > 1:
            # one may lie behind another on the path: what flows in from there has arrived already
            for node, grads in self.arrived.items():
                handles.append(node.register_prehook(lambda _, grads=grads: grads))
        try:
            torch.autograd.backward(
                [edge for edge, _ in edges],
                [grad for _, grad in edges],
                retain_graph=True,  # other weights may need it; it goes when its nodes do
                inputs=[node.variable for node in self.weights],  # type: ignore[attr-defined]
            )
        finally:
            for handle in handles:
                handle.remove()


def backward_inputs(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, inputs: Sequence[Tensor]
) -> tuple[list[Tensor | None], WeightsLater]:
    """Gradients of `inputs`, leaves, and the rest of the work. `gradients` are those of `outputs`, None = ones."""
    found = _entries(outputs, inputs)
    handles = [entries.keep(node) for entries in found for node in entries.nodes]
    try:
        grads = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return list(grads), WeightsLater(found, outputs)


def _entries(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> list[Entries]:
    """All weights in the graph of `outputs`, by the nodes where they enter the path to `inputs`."""
    above = _nodes_above([_node(output) for output in outputs])
    path = _closure([_node(tensor) for tensor in inputs], above)[0]
    at: dict[Node, Entries] = {}
    for leaf in above:
        if leaf in path or not hasattr(leaf, "variable"):  # only leaves have one
            continue
        nodes = _closure([leaf], above, stop=path)[1]
        assert nodes, "a weight that no input meets"
        entries = Entries({leaf}, nodes)
        for node in list(nodes):
            if (other := at.get(node)) is not None and other is not entries:
                entries.weights |= other.weights
                entries.nodes |= other.nodes
        at.update(dict.fromkeys(entries.nodes, entries))
    return list({id(entries): entries for entries in at.values()}.values())


def _node(tensor: Tensor) -> Node:
    """Where a gradient of `tensor` arrives."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


def _nodes_above(roots: Sequence[Node]) -> dict[Node, list[Node]]:
    """All nodes of a graph, with those that pass gradients to them."""
    above: dict[Node, list[Node]] = {root: [] for root in roots}
    waiting = list(above)
    while waiting:
        node = waiting.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            if below not in above:
                above[below] = []
                waiting.append(below)
            above[below].append(node)
    return above


def _closure(
    start: Sequence[Node], above: dict[Node, list[Node]], stop: set[Node] | None = None
) -> tuple[set[Node], set[Node]]:
    """Nodes from `start` upwards, short of those in `stop`; and these."""
    inside, met = set(start), set[Node]()
    waiting = [node for node in start if node in above]
    while waiting:
        for node in above[waiting.pop()]:
            if stop is not None and node in stop:
                met.add(node)
            elif node not in inside:
                inside.add(node)
                waiting.append(node)
    return inside, met
