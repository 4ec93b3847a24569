"""The device mesh: torchtitan's ParallelDims behind the only lines of the house that import torchtitan.

Axes (torchtitan's names): batch = ranks that read different rows; loss = ranks whose losses add up;
dp_replicate x fsdp = copies x shards of the parameters.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from nanovl.config.schema import Parallelism
from nanovl.errors import NanovlError


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands on every axis."""

    dims: Any
    """torchtitan's ParallelDims."""

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank reads."""
        batch = self.dims.get_optional_mesh("batch")
        return 0 if batch is None else batch.get_local_rank()

    @property
    def data_degree(self) -> int:
        """Ranks that read different rows."""
        return self.dims.dp_replicate * self.dims.dp_shard

    @property
    def fsdp(self) -> DeviceMesh:
        """Mesh for fully_shard: [fsdp], or [dp_replicate, fsdp] with copies (HSDP)."""
        copies = self.dims.get_optional_mesh("dp_replicate") is not None
        return self.dims.get_mesh(["dp_replicate", "fsdp"] if copies else "fsdp")

    @property
    def loss_group(self) -> dist.ProcessGroup | None:
        """Ranks over which loss sums and token counts add up; None = this rank alone."""
        loss = self.dims.get_optional_mesh("loss")
        return None if loss is None else loss.get_group()

    def __str__(self) -> str:
        if self.dims.world_size == 1:
            return "1 rank"
        copies = f"dp_replicate {self.dims.dp_replicate} x " if self.dims.dp_replicate > 1 else ""
        return f"{self.dims.world_size} ranks: {copies}dp_shard {self.dims.dp_shard}"


def build_mesh(parallelism: Parallelism, world_size: int, device: torch.device) -> Mesh:
    """The mesh of a job whose degrees check.py has accepted; needs the process group."""
    try:
        tools: Any = importlib.import_module("torchtitan.tools.utils")
        module: Any = importlib.import_module("torchtitan.distributed.parallel_dims")
    except ImportError as error:
        raise NanovlError(
            f"the device mesh needs torchtitan==0.2.2 and triton: {error}; pip install them"
        ) from error
    tools.device_type = module.device_type = device.type  # 0.2.2 takes "cuda" for granted, also on a CPU host

    class Dims(module.ParallelDims):
        def _mesh_exist(self, name: str, degree: int) -> bool:
            # fully_shard is applied at degree 1 too; 0.2.2 would give that axis a fake backend that moves no data
            return name == "fsdp" or super()._mesh_exist(name, degree)

    dims = Dims(
        dp_replicate=parallelism.data_parallel_replicate_degree,
        dp_shard=parallelism.data_parallel_shard_degree,
        cp=1,
        tp=1,
        pp=1,
        ep=1,
        etp=1,
        world_size=world_size,
    )
    dims.build_mesh()
    return Mesh(dims)


def copy_full(into: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of `full`, which every rank holds whole, into `into`, a plain tensor or DTensor."""
    if not isinstance(into, DTensor):
        into.copy_(full)
        return
    full = full.to(device=into.device, dtype=into.dtype)
    shard = distribute_tensor(full, into.device_mesh, into.placements, src_data_rank=None)
    into.to_local().copy_(shard.to_local())
