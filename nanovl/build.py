"""Job -> tokenizer, architecture, sizes, model: the one place where a job becomes objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nanovl import dist
from nanovl.config.check import check_job, data_parallel_degree
from nanovl.config.schema import Job
from nanovl.data.documents import training_texts
from nanovl.device import Modes
from nanovl.errors import ConfigError
from nanovl.initial import load_initial, tokenizer_folder, tokens_learnt, vocabulary
from nanovl.log import Log
from nanovl.mesh import Mesh
from nanovl.models.blocks.head import Head
from nanovl.optim.build import Optimizers
from nanovl.optim.scaling import SizeRules, horizon_tokens, size_rules
from nanovl.parallelisms.apply import parallelism_mistakes, parallelize
from nanovl.parallelisms.init import init_weights, materialize
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.registry import resolve_model, trained_vocabulary
from nanovl.run import Run
from nanovl.spec import ModelSpec, expert_layers
from nanovl.tokenizer.bpe import AnyTokenizer, load_tokenizer
from nanovl.tokenizer.train import train_tokenizer


def build_tokenizer(job: Job, run: Run, rank: int, log: Log) -> AnyTokenizer:
    """The run's own tokenizer: a copy of the one it begins with, or trained by rank 0. All ranks call it."""
    if rank == 0 and not run.tokenizer.exists():
        if (folder := tokenizer_folder(job)) is not None:
            tokenizer = load_tokenizer(folder)
            log.say(f"  tokenizer {folder}: {tokenizer.vocab_size:,} entries")
            learnt = tokens_learnt(job)
            if learnt is not None and learnt[1].hash() != tokenizer.hash():
                log.warn(
                    f"  tokenizer.path is another one than that of the weights, {learnt[0]}: they have learnt its ids"
                )
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


def resolve_sizes(job: Job, spec: ModelSpec, world_size: int) -> tuple[Job, SizeRules]:
    """`job` with steps, global batch and parameter groups filled in, and the factors on its learning rates.

    Raises ConfigError where the filled-in numbers break a rule.
    """
    training = job.training
    parameters = matrix_parameters(spec)
    if job.optimizer.scaling == "nanochat":
        batch_tokens = training.global_batch_size * training.seq_len
        rules = size_rules(parameters, spec.config.hidden_size, training.tokens_per_parameter, batch_tokens)
    else:
        rows = training.global_batch_size or training.local_batch_size * data_parallel_degree(job, world_size)
        batch_tokens = rows * training.seq_len
        tokens = horizon_tokens(parameters, training.tokens_per_parameter)
        rules = SizeRules(tokens, batch_tokens, tokens // batch_tokens, 1.0, 1.0, 1.0)
    training = replace(
        training,
        global_batch_size=training.global_batch_size or max(1, rules.batch_tokens // training.seq_len),
        steps=training.steps or max(1, rules.steps),
    )
    groups = job.optimizer.groups or spec.family.optimizer_groups(spec.config)
    resolved = replace(job, training=training, optimizer=replace(job.optimizer, groups=groups))
    mistakes = check_job(resolved, world_size)
    if mistakes:
        raise ConfigError(mistakes, "the sizes that follow from the model")
    return resolved, rules


def matrix_parameters(spec: ModelSpec) -> int:
    """Weights of the blocks' linear layers, multi-token prediction included, and of the head: what nanochat counts when
    it sizes a run. Of experts those that a token goes through."""
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    linears = [m.weight for b in model.blocks() for m in b.modules() if isinstance(m, nn.Linear)]
    heads = [m.weight for m in model.modules() if isinstance(m, Head)]
    return sum(w.numel() for w in linears + heads) + sum(
        layer.active_weights for layer in expert_layers(model)
    )


def build_model(
    job: Job, spec: ModelSpec, mesh: Mesh, modes: Modes, device: torch.device, log: Log, *, fresh: bool
) -> ParallelModel:
    """The parallel model; `fresh` = with initial weights, from the seed or from `checkpoint.initial_load_path`."""
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    parallel = parallelize(model, job, mesh, modes, log)
    for part in parallel.parts:
        materialize(part, device)
    if not fresh:
        return parallel
    if job.checkpoint.initial_load_path:
        load_initial(parallel, job, spec, log)
    else:
        for part in parallel.parts:
            init_weights(part, job.debug.seed)
    return parallel


def build_optimizers(
    job: Job, spec: ModelSpec, model: ParallelModel, rules: SizeRules, modes: Modes, log: Log
) -> Optimizers:
    """Optimizers over the job's groups; prints the table of who learns how."""
    with torch.device("meta"):
        all_sizes = {name: p.numel() for name, p in spec.family.model(spec.config).named_parameters()}
    optimizers = Optimizers(
        model.named_parameters(),
        job.optimizer.groups,
        job.optimizer,
        job.lr_schedule,
        steps=job.training.steps,
        width_factor=rules.width_factor,
        batch_factor=rules.batch_factor,
        decay_factor=rules.decay_factor,
        compute_dtype=modes.param_dtype,
        all_sizes=all_sizes,
    )
    log.table(*optimizers.table(), title="  optimizer groups")
    return optimizers


def check_everywhere(job: Job, world_size: int) -> None:
    """Raises ConfigError for what neither CPUs nor GPUs could train, as a run would; needs no process group."""
    spec = resolve_model(job.model, trained_vocabulary(job))
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    on_cpu, on_gpu = (parallelism_mistakes(model, job, world_size, torch.device(d)) for d in ("cpu", "cuda"))
    if wrong := [line for line in on_cpu if line in on_gpu]:
        raise ConfigError(wrong, "parallelism")
    if trained_vocabulary(job) is not None:  # else it is not known yet
        resolve_sizes(job, spec, world_size)


def check_parallelism(job: Job, world_size: int, device: torch.device, tokenizer: Path | None = None) -> None:
    """Raises ConfigError where the model cannot be cut as the job asks; needs no process group. `tokenizer` = where a
    run keeps its own."""
    spec = resolve_model(job.model, vocabulary(job, tokenizer))
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    wrong = parallelism_mistakes(model, job, world_size, device)
    if wrong:
        raise ConfigError(wrong, "parallelism")


def architecture(job: Job, tokenizer: AnyTokenizer) -> ModelSpec:
    """The job's architecture with the tokenizer's vocabulary."""
    return resolve_model(job.model, tokenizer.vocab_size)
