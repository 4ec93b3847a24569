"""FSDP2, and HSDP with a replicate axis: one unit a block, the rest in the root."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nanovl.spec import Model


def apply_fsdp(
    model: Model,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
) -> int:
    """Shard `model` over `mesh` ([fsdp] or [dp_replicate, fsdp]); returns the number of units.

    Always applied, also over one rank: the dtype policy comes with it. Gradients are summed, never averaged, since
    the loss is already divided by the weights of the whole step.
    """
    # casting is ours: rotation tables and loss weights stay float32
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    blocks = model.blocks()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # embedding, final norm and head are one unit, which is what tied embeddings need; it is used first and last
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
            module.set_gradient_divide_factor(1.0)
    return len(blocks) + 1
