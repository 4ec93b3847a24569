"""Job -> tokenizer, architecture, sizes, model: the one place where a job becomes objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nanovl import dist
from nanovl.checkpoint.locate import fill, spec_at
from nanovl.config.check import check_job, data_parallel_degree
from nanovl.config.schema import Job
from nanovl.data.documents import training_texts
from nanovl.device import Modes
from nanovl.errors import ConfigError
from nanovl.log import Log
from nanovl.mesh import Mesh
from nanovl.models.blocks.head import Head
from nanovl.optim.build import Optimizers
from nanovl.optim.scaling import Scaling, nanochat_scaling
from nanovl.parallelisms.apply import parallelize
from nanovl.parallelisms.init import init_weights, materialize
from nanovl.registry import resolve_model
from nanovl.run import Run
from nanovl.spec import ModelSpec
from nanovl.tokenizer.bpe import AnyTokenizer, load_tokenizer
from nanovl.tokenizer.train import train_tokenizer

REFERENCE_DEPTH = 12  # the size that nanochat's learning rates and batch were tuned at


def build_tokenizer(job: Job, run: Run, rank: int, log: Log) -> AnyTokenizer:
    """The run's own tokenizer: copied from `tokenizer.path`, or trained on the training text by rank 0. All ranks call it."""
    if rank == 0 and not run.tokenizer.exists():
        if job.tokenizer.path:
            tokenizer = load_tokenizer(Path(job.tokenizer.path))
        else:
            settings = job.tokenizer
            log.say(f"  tokenizer training {settings.vocab_size:,} entries with {settings.trainer}")
            tokenizer = train_tokenizer(
                training_texts(job),
                settings.vocab_size,
                trainer=settings.trainer,
                max_characters=settings.train_characters,
                document_characters=settings.document_characters,
            )
        tokenizer.save(run.tokenizer)
    dist.barrier()
    return load_tokenizer(run.tokenizer)


def resolve_sizes(job: Job, spec: ModelSpec, world_size: int) -> tuple[Job, Scaling]:
    """`job` with steps, global batch and parameter groups filled in, and the factors on its learning rates.

    Raises ConfigError where the filled-in numbers break a rule.
    """
    counted = matrix_parameters(spec)
    if job.optimizer.scaling == "nanochat":
        if not hasattr(spec.config, "depth"):
            raise ConfigError(f'optimizer.scaling = "nanochat": {spec.family.name} has no depth; use "none"')
        reference = matrix_parameters(ModelSpec(spec.family, replace(spec.config, depth=REFERENCE_DEPTH)))
        scaling = nanochat_scaling(
            parameters=counted,
            reference_parameters=reference,
            hidden_size=spec.config.hidden_size,
            tokens_per_parameter=job.training.tokens_per_parameter,
            batch_tokens=job.training.global_batch_size * job.training.seq_len,
        )
    else:
        rows = job.training.global_batch_size or job.training.local_batch_size * data_parallel_degree(job, world_size)
        horizon = round(job.training.tokens_per_parameter * counted)
        scaling = Scaling.none(batch_tokens=rows * job.training.seq_len, horizon_tokens=horizon)
    training = replace(
        job.training,
        global_batch_size=job.training.global_batch_size or max(1, scaling.batch_tokens // job.training.seq_len),
        steps=job.training.steps or max(1, scaling.steps),
    )
    groups = job.optimizer.groups or spec.family.optimizer_groups(spec.config)
    resolved = replace(job, training=training, optimizer=replace(job.optimizer, groups=groups))
    mistakes = check_job(resolved, world_size)
    if mistakes:
        raise ConfigError(mistakes, "the sizes that follow from the model")
    return resolved, scaling


def matrix_parameters(spec: ModelSpec) -> int:
    """Weights of the blocks' linear layers and of the head: what nanochat counts when it sizes a run."""
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    linears = [m.weight for b in model.blocks() for m in b.modules() if isinstance(m, nn.Linear)]  # type: ignore[operator]
    heads = [m.weight for m in model.modules() if isinstance(m, Head)]
    return sum(w.numel() for w in linears + heads)


def build_model(job: Job, spec: ModelSpec, mesh: Mesh, modes: Modes, device: torch.device, log: Log, *, fresh: bool) -> nn.Module:
    """The parallel model; `fresh` = with initial weights, from the seed or from `checkpoint.initial_load_path`."""
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    parallelize(model, job, mesh, modes, log)
    materialize(model, device)
    if not fresh:
        return model
    if job.checkpoint.initial_load_path:
        source = Path(job.checkpoint.initial_load_path)
        given = spec_at(source)
        if given.family.name != spec.family.name or given.config != spec.config:
            raise ConfigError(
                f"checkpoint.initial_load_path: {source} holds {given.family.name} {given.config}, "
                f"the job wants {spec.family.name} {spec.config}; make [model] the same"
            )
        fill(model, source, spec)
        log.say(f"  weights   {source}")
    else:
        init_weights(model, job.debug.seed)
    return model


def build_optimizers(job: Job, model: nn.Module, scaling: Scaling, modes: Modes, log: Log) -> Optimizers:
    """Optimizers over the job's groups; prints the table of who learns how."""
    optimizers = Optimizers(
        list(model.named_parameters()),
        job.optimizer,
        job.lr_schedule,
        steps=job.training.steps,
        scaling=scaling,
        compute_dtype=modes.param_dtype,
    )
    log.table(*optimizers.table(), title="  optimizer groups")
    return optimizers


def architecture(job: Job, tokenizer: AnyTokenizer) -> ModelSpec:
    """The job's architecture with the tokenizer's vocabulary."""
    return resolve_model(job.model, tokenizer.vocab_size)
