"""torch.compile, one graph a block: layers share it, so compilation time does not grow with depth.

A block with experts has no single graph: how many rows an expert gets is known to the host in between, and changes
every step. There attention, the shared expert and the experts' activation are one graph each; routing, transfers and
grouped products run as they are.
"""

from __future__ import annotations

from torch import nn

from nanovl.spec import ExpertLayer, Model, expert_layers


def apply_compile(model: Model, backend: str) -> int:
    """Compile every block; returns how many."""
    blocks = model.blocks()
    for block in blocks:
        for part in graphs(block):
            part.compile(backend=backend, fullgraph=True)
    return len(blocks)


def graphs(block: nn.Module) -> list[nn.Module]:
    """What becomes one graph: a block without experts, else its composite children and what the expert layer names."""
    if not expert_layers(block):
        return [block]
    parts = []
    for child in block.children():
        if isinstance(child, ExpertLayer):
            parts += child.graphs()
        elif any(True for _ in child.children()):
            parts += graphs(child)
    return parts
