"""FSDP2, HSDP with a replicate axis, DDP with nothing but one: one unit a block, the rest in the root."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from nanovl.config.schema import Job, Parallelism
from nanovl.mesh import Mesh
from nanovl.parallelisms.expert import (
    expert_modules,
    expert_placement,
    hide_gathering,
    prefetch_around_experts,
)
from nanovl.spec import Model


def reshards_after_forward(config: Parallelism, mesh: Mesh) -> bool:
    """Whether blocks free their gathered weights between forward and backward."""
    # a pipeline would gather a block's weights again for every micro-batch
    by_default = mesh.size("fsdp") > 1 and mesh.size("pp") == 1
    policy = config.fsdp_reshard_after_forward
    return policy == "always" or (policy == "default" and by_default)


def apply_fsdp(model: Model, job: Job, mesh: Mesh, param_dtype: torch.dtype) -> int:
    """Shard `model` over the mesh's data ranks; returns the number of units.

    Always applied, also over one rank: the dtype policy comes with it. Gradients are summed, never averaged, since
    the loss is already divided by the weights of the whole step. Experts are units of their own where the ranks that
    share them are not those that share the rest.
    """
    config = job.parallelism
    options: dict[str, Any] = {
        # casting is ours: rotation tables and loss weights stay float32
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype,
            reduce_dtype=getattr(torch, job.training.mixed_precision_reduce),
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if config.enable_cpu_offload else OffloadPolicy(),
        "shard_placement_fn": expert_placement(model, mesh),
    }
    reshard = reshards_after_forward(config, mesh)
    units = 0
    for block in model.blocks():
        for experts in expert_modules(block, mesh):
            fully_shard(experts, mesh=mesh.experts, reshard_after_forward=reshard, **options)
            hide_gathering(experts)
            units += 1
        fully_shard(block, mesh=mesh.fsdp, reshard_after_forward=reshard, **options)
        units += 1
    # embedding, final norm and head are one unit, which is what tied embeddings need; it is used first and last
    fully_shard(model, mesh=mesh.fsdp, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
            module.set_gradient_divide_factor(1.0)
    if mesh.size("ep") > 1:
        prefetch_around_experts(model)
    return units + 1
