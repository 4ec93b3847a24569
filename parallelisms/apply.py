"""The one order in which a model is made parallel.

pipeline      which layers are here at all
tensor        cuts what is left: heads, channels, vocabulary, and the sequence between layers
expert        cuts experts instead of tensor parallelism
context       cuts the sequence inside attention
memory        activation checkpointing, before compile, so that the compiler sees what is recomputed
compile       one graph a block
fully_shard   last, so that its hooks stay outside of the compiled graphs; always, also over one rank
"""

from __future__ import annotations

from collections import Counter

import torch

from nanovl.config.schema import Job
from nanovl.device import Modes
from nanovl.errors import ConfigError
from nanovl.log import Log
from nanovl.mesh import Mesh
from nanovl.parallelisms import context, expert, pipeline_split, tensor
from nanovl.parallelisms.compile import apply_compile
from nanovl.parallelisms.fsdp import apply_fsdp
from nanovl.parallelisms.memory import apply_activation_checkpointing
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.parallelisms.pipeline import Pipeline, whole_backward_reasons
from nanovl.spec import Model

GPU_KERNELS = {"flex": "FlexAttention", "varlen": "FlashAttention"}


def parallelism_mistakes(model: Model, job: Job, world_size: int, device: torch.device) -> list[str]:
    """What `job` asks for and `model`, whole and on the meta device, does not allow, one line each.

    The degrees themselves must be accepted by config/check.py already.
    """
    return [
        *pipeline_split.mistakes(model, job, world_size),
        *tensor.mistakes(model, job, device),
        *expert.mistakes(model, job),
        *context.mistakes(model, job),
        *_device_mistakes(model, job, device),
    ]


def _device_mistakes(model: Model, job: Job, device: torch.device) -> list[str]:
    wrong = []
    if job.parallelism.enable_cpu_offload and device.type == "cpu":
        wrong.append(
            "parallelism.enable_cpu_offload = true: there is no accelerator to offload from; leave it out on a CPU"
        )
    config = model.config
    for name in dict.fromkeys([*config.layer_names(), config.mtp_block()]):
        kernel = getattr(config.blocks[name].mixer, "kernel", None)
        key = f"model.blocks.{name}.mixer.kernel = {kernel!r}"
        if kernel in GPU_KERNELS and device.type != "cuda":
            wrong.append(f"{key}: {GPU_KERNELS[kernel]} trains on a GPU alone; choose auto or eager")
        elif kernel == "varlen" and job.training.mixed_precision_param == "float32":
            wrong.append(
                f"{key}: FlashAttention knows no float32; set training.mixed_precision_param to bfloat16"
            )
    return wrong


def cut_part(part: Model, job: Job, mesh: Mesh) -> Counter[str]:
    """What is done to one stage before it is compiled and sharded; returns what was changed how often."""
    config = job.parallelism
    return Counter(
        {
            "tensor parallel (modules)": tensor.apply_tensor_parallel(part, config, mesh),
            "expert parallel (layers)": expert.apply_expert_parallel(part, config, mesh),
            "context parallel (layers)": context.apply_context_parallel(part, config, mesh),
            "activation checkpointing (blocks)": apply_activation_checkpointing(
                part, job.activation_checkpoint
            ),
        }
    )


def parallelize(model: Model, job: Job, mesh: Mesh, modes: Modes, log: Log) -> ParallelModel:
    """Make a meta-device model parallel as the job asks, in place; each step that does something says so.

    Raises ConfigError for what cannot be.
    """
    wrong = parallelism_mistakes(model, job, mesh.dims.world_size, modes.device)
    if wrong:
        raise ConfigError(wrong, "parallelism")
    config = job.parallelism
    parts, elsewhere = pipeline_split.split(model, job, mesh)
    applied: Counter[str] = Counter()
    for part in parts:
        applied.update(cut_part(part, job, mesh))
        if modes.compile:
            applied["compile (blocks)"] += apply_compile(part, job.compile.backend)
        applied["FSDP2 (units)"] += apply_fsdp(part, job, mesh, modes.param_dtype)
    runner = None if mesh.size("pp") == 1 else Pipeline(parts, job, mesh, modes)
    dtypes = f"{str(modes.param_dtype).removeprefix('torch.')} compute, {job.training.mixed_precision_reduce} reduce"
    log.say(f"  applied   {', '.join(f'{what}: {n}' for what, n in applied.items() if n)}; {dtypes}")
    if runner is not None:
        _say_pipeline(model, job, mesh, modes, log)
    sequence = context.sequence_cut(config, mesh)
    return ParallelModel(parts, mesh, sequence, runner, bool(config.fsdp_reduce_last_only), elsewhere)


def _say_pipeline(model: Model, job: Job, mesh: Mesh, modes: Modes, log: Log) -> None:
    """Which layers are where, and whether the schedule can do what it is for."""
    schedule, counts = job.parallelism.pipeline_parallel_schedule, pipeline_split.layers_of_stages(model, job)
    log.say(f"  pipeline  {schedule} over {mesh.size('pp')} ranks, layers of each stage: {counts}")
    reasons = whole_backward_reasons(job, mesh, modes)
    if schedule in pipeline_split.SPLIT_BACKWARD and reasons:
        log.warn(
            f"  pipeline  {schedule} cannot part weights' gradients from inputs' with {' and '.join(reasons)}: results "
            "are the same, but nothing fills its bubble; turn that off, or use Interleaved1F1B"
        )
