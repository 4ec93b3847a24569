"""The device mesh: torchtitan's ParallelDims behind the only lines of the house that import torchtitan.

One world, cut three ways (torchtitan's names):

    data     [pp, batch, cp, tp]                     batch = dp_replicate x dp_shard: ranks that read different rows
    dense    [pp, dp_replicate, fsdp, tp]            fsdp  = dp_shard x cp: shards of one copy of the parameters
    sparse   [pp, dp_replicate, efsdp, ep, etp]      efsdp = fsdp x tp / (ep x etp): shards of one copy of an expert

Expert parallelism takes its ranks from fsdp and tp; it is no factor of the world size.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from nanovl.config.schema import Parallelism
from nanovl.errors import NanovlError

Axis = Literal["pp", "batch", "loss", "dp_replicate", "fsdp", "cp", "tp", "ep", "efsdp", "etp"]


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands on every axis."""

    dims: Any
    """torchtitan's ParallelDims."""

    def size(self, axis: Axis) -> int:
        """Ranks along `axis`."""
        return int(self.dims._meshes[axis].size())

    def rank(self, axis: Axis) -> int:
        """This rank's place along `axis`."""
        return int(self.dims._meshes[axis].get_local_rank()) if self.size(axis) > 1 else 0

    def axis(self, axis: Axis) -> DeviceMesh | None:
        """The one-dimensional mesh; None where it has one rank and so no process group."""
        return self.dims.get_optional_mesh(axis)

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """Process group of `axis`; None where it has one rank."""
        found = self.axis(axis)
        return None if found is None or found.size() == 1 else found.get_group()

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank reads."""
        return self.rank("batch")

    @property
    def data_degree(self) -> int:
        """Ranks that read different rows."""
        return self.size("batch")

    @property
    def fsdp(self) -> DeviceMesh:
        """Mesh for fully_shard: [fsdp], or [dp_replicate, fsdp] with copies (HSDP)."""
        return self._with_copies("fsdp")

    @property
    def experts(self) -> DeviceMesh:
        """Mesh for fully_shard of experts: [efsdp], or [dp_replicate, efsdp]."""
        return self._with_copies("efsdp")

    @property
    def whole_model_here(self) -> bool:
        """Whether every rank runs all layers on whole rows: nothing but data and experts is cut."""
        return all(self.size(axis) == 1 for axis in ("pp", "cp", "tp"))

    def _with_copies(self, axis: Axis) -> DeviceMesh:
        return self.dims.get_mesh(["dp_replicate", axis] if self.size("dp_replicate") > 1 else axis)

    def __str__(self) -> str:
        if self.dims.world_size == 1:
            return "1 rank"
        dims = self.dims
        names = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")
        degrees = [f"{n} {getattr(dims, n)}" for n in names if getattr(dims, n) > 1]
        return f"{dims.world_size} ranks: {' x '.join(degrees)}"


def import_torchtitan() -> tuple[Any, Any]:
    """Its `tools.utils` and `distributed.parallel_dims`. Raises NanovlError where it cannot be imported."""
    try:
        return (
            importlib.import_module("torchtitan.tools.utils"),
            importlib.import_module("torchtitan.distributed.parallel_dims"),
        )
    except ImportError as error:
        raise NanovlError(
            f"the device mesh needs torchtitan==0.2.2 and triton: {error}; pip install them"
        ) from error


def build_mesh(parallelism: Parallelism, world_size: int, device: torch.device) -> Mesh:
    """The mesh of a job whose degrees check.py has accepted; needs the process group."""
    tools, module = import_torchtitan()
    parallel_dims: Any = module.ParallelDims
    tools.device_type = module.device_type = device.type  # 0.2.2 takes "cuda" for granted, also on a CPU host
    # gathering over two axes in turn is meant; torch would warn of it on every rank
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    class Dims(parallel_dims):
        def _mesh_exist(self, name: str, degree: int) -> bool:
            # fully_shard is applied at degree 1 too; 0.2.2 would give that axis a fake backend that moves no data
            return name in ("fsdp", "efsdp") or super()._mesh_exist(name, degree)

    dims = Dims(
        dp_replicate=parallelism.data_parallel_replicate_degree,
        dp_shard=parallelism.data_parallel_shard_degree,
        cp=parallelism.context_parallel_degree,
        tp=parallelism.tensor_parallel_degree,
        pp=parallelism.pipeline_parallel_degree,
        ep=parallelism.expert_parallel_degree,
        etp=parallelism.expert_tensor_parallel_degree,
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
