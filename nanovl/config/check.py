"""Rules that join sections. Each returns its mistakes; none stops at the first."""

from __future__ import annotations

import math
import re
from operator import attrgetter

from nanovl.config.schema import Job, Source

SPECIAL_TOKENS = 9
MIN_VOCAB = 256 + SPECIAL_TOKENS

POSITIVE = (
    "training.seq_len",
    "training.tokens_per_parameter",
    "metrics.log_freq",
    "data.buffer_documents",
    "activation_checkpoint.every_n_layers",
    "tokenizer.train_characters",
    "tokenizer.document_characters",
    "sampling.max_tokens",
    "validation.max_bytes",
    "profiling.profile_freq",
    "profiling.profiler_active",
    "optimizer.muon.iterations",
    "comm.init_timeout_seconds",
    "comm.train_timeout_seconds",
    "comm.outside_timeout_seconds",
    "comm.max_clock_skew_seconds",
)
NOT_NEGATIVE = (
    "parallelism.pipeline_parallel_stages_per_rank",
    "training.steps",
    "training.global_batch_size",
    "training.local_batch_size",
    "training.max_norm",
    "training.loss_chunk_tokens",
    "training.gc_freq",
    "training.max_skipped_steps",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "lr_schedule.warmup_steps",
    "data.prefetch_batches",
    "checkpoint.interval",
    "checkpoint.keep_latest_k",
    "validation.freq",
    "validation.final_max_bytes",
    "validation.local_batch_size",
    "sampling.freq",
    "sampling.temperature",
    "sampling.top_k",
    "profiling.profiler_warmup",
    "optimizer.muon.momentum_warmup_steps",
    "optimizer.muon.qk_clip",
    "comm.trace_buf_size",
    "debug.seed",
)
FRACTIONS = (
    "lr_schedule.decay_ratio",
    "lr_schedule.min_lr_factor",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.muon.momentum",
    "optimizer.muon.momentum_start",
    "optimizer.muon.momentum_end",
)


def check_job(job: Job, world_size: int) -> list[str]:
    """Every broken rule of `job` on `world_size` ranks, one line each."""
    return [
        *_bounds(job),
        *_degrees(job, world_size),
        *_sequence(job),
        *_batch(job, world_size),
        *_tokenizer(job),
        *_sources(job),
        *_optimizer(job),
        *_checkpoint(job),
    ]


def data_parallel_degree(job: Job, world_size: int) -> int:
    """Ranks that read different rows: those of one tensor, context or pipeline group read the same."""
    p = job.parallelism
    shared = p.tensor_parallel_degree * p.context_parallel_degree * p.pipeline_parallel_degree
    return max(1, world_size // max(1, shared))


def _bounds(job: Job) -> list[str]:
    """Numbers that must be positive, or not negative, and fractions that must be in [0, 1]."""
    positive, not_negative, fractions = (
        {key: attrgetter(key)(job) for key in keys} for keys in (POSITIVE, NOT_NEGATIVE, FRACTIONS)
    )
    for name, sources in (("data", job.data.sources), ("validation", job.validation.sources)):
        fractions |= {f"{name}.sources.{i}.holdout": source.holdout for i, source in enumerate(sources)}
    return [
        *(f"{key} = {value}: wants a number above 0" for key, value in positive.items() if value <= 0),
        *(f"{key} = {value}: wants 0 or more" for key, value in not_negative.items() if value < 0),
        *(
            f"{key} = {value}: wants a number from 0 to 1"
            for key, value in fractions.items()
            if not 0 <= value <= 1
        ),
    ]


def _degrees(job: Job, world_size: int) -> list[str]:
    """Degrees that cannot make up the world; what the model's heads and layers allow is parallelisms/apply.py's."""
    p = job.parallelism
    shard = p.data_parallel_shard_degree
    factors = {
        "data_parallel_replicate_degree": p.data_parallel_replicate_degree,
        "context_parallel_degree": p.context_parallel_degree,
        "tensor_parallel_degree": p.tensor_parallel_degree,
        "pipeline_parallel_degree": p.pipeline_parallel_degree,
    }
    experts = {
        "expert_parallel_degree": p.expert_parallel_degree,
        "expert_tensor_parallel_degree": p.expert_tensor_parallel_degree,
    }
    wrong = [
        f"parallelism.{name} = {value}: wants 1 or more"
        for name, value in {**factors, **experts}.items()
        if value < 1
    ]
    if shard != -1 and shard < 1:
        wrong.append(
            f"parallelism.data_parallel_shard_degree = {shard}: wants 1 or more, or -1 for all that are left"
        )
    if wrong:
        return wrong
    product = math.prod(factors.values())
    used = [(name, value) for name, value in factors.items() if value > 1]
    made_of = " x ".join(f"{name} {value}" for name, value in used)
    if shard == -1 and world_size % product:
        if len(used) == 1:
            name, value = used[0]
            return [
                f"parallelism.{name} = {value} does not divide the {world_size} ranks; "
                f"use {_nearest_divisors(value, world_size)}, or launch a multiple of {value}"
            ]
        return [
            f"parallelism: {made_of} = {product} does not divide the {world_size} ranks; "
            f"launch a multiple of {product}, or lower one of them"
        ]
    if shard != -1 and product * shard != world_size:
        return [
            f"parallelism: {made_of + ' x ' if made_of else ''}data_parallel_shard_degree {shard} = "
            f"{product * shard}, but the job has {world_size} ranks; "
            "launch that many, or set data_parallel_shard_degree = -1"
        ]
    return _expert_degrees(job, world_size // product if shard == -1 else shard)


def _expert_degrees(job: Job, shard: int) -> list[str]:
    """Experts borrow the ranks of fsdp x tp."""
    p, wrong = job.parallelism, []
    ep, etp, tp = p.expert_parallel_degree, p.expert_tensor_parallel_degree, p.tensor_parallel_degree
    lent = shard * p.context_parallel_degree * tp
    if etp not in (1, tp):
        wrong.append(
            f"parallelism.expert_tensor_parallel_degree = {etp}: wants 1, or tensor_parallel_degree = {tp}"
        )
    elif lent % (ep * etp):
        wrong.append(
            f"parallelism.expert_parallel_degree = {ep}{f' x expert_tensor_parallel_degree {etp}' if etp > 1 else ''} "
            f"does not divide the {lent} ranks of dp_shard x cp x tp that experts can use; "
            f"use {_nearest_divisors(ep, lent // etp)}"
        )
    return wrong


def _nearest_divisors(number: int, of: int) -> str:
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    near = sorted(sorted(divisors, key=lambda d: abs(d - number))[:2])
    return " or ".join(map(str, near))


def _sequence(job: Job) -> list[str]:
    """Rows are cut into 2 cp chunks, and the chunks of a rank over its tensor group."""
    p, length = job.parallelism, job.training.seq_len
    cp, tp = p.context_parallel_degree, p.tensor_parallel_degree
    unit = (2 * cp if cp > 1 else 1) * tp
    if min(cp, tp, length) < 1 or length % unit == 0:
        return []
    low, high = length // unit * unit, -(-length // unit) * unit
    near = f"{low} or {high}" if low else f"{high}"
    parts = [
        *(["2 x context_parallel_degree"] if cp > 1 else []),
        *(["tensor_parallel_degree"] if tp > 1 else []),
    ]
    return [f"training.seq_len = {length} is not a multiple of {' x '.join(parts)} = {unit}; use {near}"]


def _batch(job: Job, world_size: int) -> list[str]:
    rows, local = job.training.global_batch_size, job.training.local_batch_size
    dp = data_parallel_degree(job, world_size)
    if rows == 0 and local == 0 and job.optimizer.scaling == "none":
        return ["training.global_batch_size and training.local_batch_size are both 0; set one"]
    if rows <= 0 or local < 0 or rows % (unit := dp * max(local, 1)) == 0:
        return []
    low, high = rows // unit * unit, -(-rows // unit) * unit
    near = f"{low} or {high}" if low else f"{high}"
    return [
        f"training.global_batch_size = {rows} is not a multiple of {dp} ranks"
        + (
            f" x {local} rows = {unit}; use {near}, or set training.local_batch_size"
            if local
            else f"; use {near}"
        )
    ]


def has_tokenizer(job: Job) -> bool:
    """Whether none is to be trained: weights to begin from bring theirs."""
    return bool(job.tokenizer.path or job.checkpoint.initial_load_path)


def _tokenizer(job: Job) -> list[str]:
    if not has_tokenizer(job) and job.tokenizer.vocab_size < MIN_VOCAB:
        return [
            f"tokenizer.vocab_size = {job.tokenizer.vocab_size}: "
            f"wants at least {MIN_VOCAB} (256 bytes and {SPECIAL_TOKENS} special tokens)"
        ]
    return []


def _sources(job: Job) -> list[str]:
    mistakes = []
    named: list[tuple[str, Source]] = [(f"data.sources.{i}", s) for i, s in enumerate(job.data.sources)]
    named += [(f"validation.sources.{i}", s) for i, s in enumerate(job.validation.sources)]
    if not job.data.sources:
        mistakes.append(
            'data.sources: empty; add [[data.sources]] with a kind and a path (kind = "stdlib" needs no path)'
        )
    for key, source in named:
        if source.kind != "stdlib" and not source.path:
            mistakes.append(f'{key}.path: empty; name the file or folder of kind "{source.kind}"')
        if source.kind == "stdlib" and source.path:
            mistakes.append(
                f'{key}.path = {source.path!r}: kind "stdlib" needs none; leave it out, or name another kind'
            )
        if source.kind == "tokens" and key.startswith("validation"):
            mistakes.append(
                f'{key}: kind "tokens" holds no text to count bytes of; validate on its text files'
            )
        if source.weight <= 0:
            mistakes.append(f"{key}.weight = {source.weight}: wants a number above 0")
    validates = job.validation.freq > 0
    if (
        validates
        and job.data.sources
        and not job.validation.sources
        and not any(s.holdout for s in job.data.sources)
    ):
        mistakes.append(
            "validation.freq: there is no held-out text; set data.sources.N.holdout (such as 0.02), "
            "add [[validation.sources]], or set validation.freq = 0"
        )
    if not has_tokenizer(job) and any(s.kind == "tokens" for s in job.data.sources):
        mistakes.append(
            'tokenizer.path: empty, but a source of kind "tokens" is bound to the tokenizer it was packed with; name it'
        )
    return mistakes


def _optimizer(job: Job) -> list[str]:
    mistakes = []
    for i, group in enumerate(job.optimizer.groups):
        try:
            re.compile(group.match)
        except re.error as error:
            mistakes.append(
                f"optimizer.groups.{i}.match = {group.match!r}: not a regular expression: {error}"
            )
        for name, most in (("lr", math.inf), ("weight_decay", math.inf), ("beta1", 1.0), ("beta2", 1.0)):
            value = getattr(group, name)
            if value is not None and not 0 <= value <= most:
                wanted = "0 or more" if most == math.inf else "a number from 0 to 1"
                mistakes.append(f"optimizer.groups.{i}.{name} = {value}: wants {wanted}")
    if job.optimizer.muon.orthogonalization == "polar_express" and job.optimizer.muon.iterations > 5:
        mistakes.append(
            f"optimizer.muon.iterations = {job.optimizer.muon.iterations}: polar_express has coefficients for 5; "
            'use 5 or fewer, or orthogonalization = "newton_schulz"'
        )
    if job.optimizer.muon.qk_clip > 0 and job.parallelism.context_parallel_degree > 1:
        mistakes.append(
            f"optimizer.muon.qk_clip = {job.optimizer.muon.qk_clip}: cannot see the logits of tokens on other ranks; "
            "set it to 0, or parallelism.context_parallel_degree = 1"
        )
    return mistakes


def _checkpoint(job: Job) -> list[str]:
    if not job.checkpoint.initial_load_grow or job.checkpoint.initial_load_path:
        return []
    return [
        "checkpoint.initial_load_grow = true: there are no weights to begin with; set checkpoint.initial_load_path, or "
        "leave it out"
    ]
