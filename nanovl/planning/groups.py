"""What process groups are called in a plan, and which ranks are in them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from nanovl.mesh import Axis, Mesh
from nanovl.planning.ledger import Traffic

AXES: tuple[Axis, ...] = ("tp", "cp", "ep", "etp", "pp", "dp_replicate", "fsdp", "efsdp", "batch")
"""Where two axes are the same ranks, traffic goes by the first."""
WORLD = "world"


class Groups:
    """Axes of a mesh by process group; a group that is no axis, such as a team of Muon's, is called by its size."""

    def __init__(self, mesh: Mesh) -> None:
        self.world = dist.get_world_size()
        self.axes: dict[str, str] = {}
        self.members: dict[str, list[int]] = {WORLD: list(range(self.world))}
        for axis in AXES:
            group = mesh.group(axis)
            if group is not None:
                self.axes.setdefault(group.group_name, axis)
                self.members[axis] = dist.get_process_group_ranks(group)

    def named(self, traffic: Traffic) -> Traffic:
        """`traffic` by axis instead of process group."""
        return traffic.renamed({group: self._name(group) for group, _ in traffic.bytes})

    def _name(self, group_name: str) -> str:
        if group_name in self.axes:
            return self.axes[group_name]
        resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        ranks = dist.get_process_group_ranks(resolve(group_name))
        name = WORLD if len(ranks) == self.world else f"{len(ranks)} ranks"
        self.members[name] = ranks
        return name
