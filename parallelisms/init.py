"""Memory and initial weights for a model built on the meta device, the same on every mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch

from nanovl.mesh import copy_full
from nanovl.spec import Model


def materialize(model: Model, device: torch.device) -> None:
    """Give the parameters and buffers of a meta-device model memory on `device`; their values are still garbage."""
    model.to_empty(device=device)
    model.init_buffers(device)


@torch.no_grad()
def init_weights(model: Model, seed: int, names: Collection[str] | None = None) -> None:
    """Draw every parameter, or those called `names`, in full from a generator seeded by (seed, its name), keep this
    rank's part.

    DTensor's own random init depends on the mesh, and on a CPU mesh gives every shard the same values. This depends on
    nothing but seed and name, at the price of one whole parameter in memory at a time.
    """
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        full = torch.empty(parameter.shape, dtype=torch.float32)
        model.init_parameter(name, full, named_generator(seed, name))
        copy_full(parameter, full)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one purpose; CPU, so that a GPU run draws the same numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
