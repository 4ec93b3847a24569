"""The one order in which a model is made parallel.

Activation checkpointing comes before compile, so that the compiler sees what is recomputed; fully_shard comes last,
so that its hooks stay outside of the compiled graphs.
"""

from __future__ import annotations

import torch

from nanovl.config.schema import Job
from nanovl.device import Modes
from nanovl.log import Log
from nanovl.mesh import Mesh
from nanovl.parallelisms.compile import apply_compile
from nanovl.parallelisms.fsdp import apply_fsdp
from nanovl.parallelisms.memory import apply_activation_checkpointing
from nanovl.spec import Model


def parallelize(model: Model, job: Job, mesh: Mesh, modes: Modes, log: Log) -> None:
    """Apply every parallelism the job asks for to a meta-device model, in place; each logs a count."""
    blocks = len(model.blocks())
    applied = []
    recomputed = apply_activation_checkpointing(model, job.activation_checkpoint)
    if recomputed:
        applied.append(f"activation checkpointing ({recomputed} of {blocks} blocks)")
    if modes.compile:
        applied.append(f"compile ({apply_compile(model, job.compile.backend)} of {blocks} blocks)")
    policy = job.parallelism.fsdp_reshard_after_forward
    reshard = policy == "always" or (policy == "default" and mesh.dims.dp_shard > 1)
    reduce_dtype: torch.dtype = getattr(torch, job.training.mixed_precision_reduce)
    units = apply_fsdp(model, mesh.fsdp, modes.param_dtype, reduce_dtype, reshard)
    names = [str(d).removeprefix("torch.") for d in (modes.param_dtype, reduce_dtype)]
    applied.append(f"FSDP2 ({units} units, {names[0]} compute, {names[1]} reduce)")
    log.say(f"  applied   {', '.join(applied)}")
