"""torch.compile, one graph a block: layers share it, so compilation time does not grow with depth."""

from __future__ import annotations

from nanovl.spec import Model


def apply_compile(model: Model, backend: str) -> int:
    """Compile every block; returns how many."""
    blocks = model.blocks()
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    return len(blocks)
