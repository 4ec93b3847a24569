"""The model whose weights a job begins from, at `checkpoint.initial_load_path`: its tokenizer, and what it lacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanovl.checkpoint.locate import find_source
from nanovl.checkpoint.sources import Source
from nanovl.checkpoint.tensors import weights_of
from nanovl.config.schema import Job
from nanovl.errors import CheckpointError, ConfigError
from nanovl.log import Log
from nanovl.optim.groups import shorten
from nanovl.parallelisms.init import init_weights
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.registry import resolve_model
from nanovl.spec import ModelSpec, computed, ungrown
from nanovl.tokenizer.bpe import AnyTokenizer, load_tokenizer


@dataclass(frozen=True)
class Initial:
    """Weights to begin from, compared with the model."""

    source: Source
    fresh: frozenset[str]
    """Tensors of the model that begin as in a fresh run: of parts to grow, and counters that the weights lack."""
    unused: frozenset[str]
    """Counters of the weights that the model lacks."""


def find_initial(job: Job, spec: ModelSpec) -> Initial:
    """What is at `checkpoint.initial_load_path`. Raises CheckpointError, and ConfigError where it is another model."""
    path, grow = Path(job.checkpoint.initial_load_path), job.checkpoint.initial_load_grow
    source = find_source(path)
    given = source.spec
    known = replace(spec, config=ungrown(spec.config, given.config)) if grow else spec
    begun, unused = counters_apart(given, known)
    if wrong := differences(given, known):
        raise ConfigError(
            [
                *wrong,
                *_misfits(weights_of(given), weights_of(known), begun | unused),
                *_remedies(given, known),
            ],
            f"checkpoint.initial_load_path: {path} holds another model than [model]",
        )
    grown = weights_of(spec).keys() - weights_of(known).keys()
    if grow and not grown:
        raise ConfigError(
            f"checkpoint.initial_load_grow = true: {path} has every part of the model; leave it out"
        )
    return Initial(source, begun | grown, unused)


def counters_apart(given: ModelSpec, wanted: ModelSpec) -> tuple[frozenset[str], frozenset[str]]:
    """Counters of `wanted` that weights of `given` lack, which begin anew, and those that `wanted` has no use for."""
    with torch.device("meta"):
        held, asked = (spec.family.model(spec.config).counter_names() for spec in (given, wanted))
    return frozenset(asked - held), frozenset(held - asked)


def counters_to_resume(checkpoint: Path, spec: ModelSpec) -> tuple[frozenset[str], frozenset[str]]:
    """`counters_apart` of a run's checkpoint and the model that goes on from it.

    Raises CheckpointError where it cannot be read, and ConfigError where it is another model.
    """
    given = find_source(checkpoint).spec
    if wrong := differences(given, spec):
        advice = "a run goes on with the model it began with; start another with checkpoint.initial_load_path"
        raise ConfigError([*wrong, advice], f"--resume: {checkpoint} holds another model than [model]")
    return counters_apart(given, spec)


def load_initial(parallel: ParallelModel, job: Job, spec: ModelSpec, log: Log) -> None:
    """Begin with the weights at `checkpoint.initial_load_path`, and with fresh ones in parts that these lack."""
    initial = find_initial(job, spec)
    for part in parallel.parts:
        init_weights(part, job.debug.seed, initial.fresh)
    initial.source.fill(parallel.whole, initial.fresh, initial.unused)
    log.say(f"  weights   {job.checkpoint.initial_load_path}{told(initial.fresh, initial.unused)}")


def told(fresh: Collection[str], unused: Collection[str]) -> str:
    """What a log line adds of tensors that begin anew and of those that are left aside."""
    both = (("fresh", fresh), ("not used", unused))
    return "".join(f"; {what}: {shorten(sorted(names))}" for what, names in both if names)


def differences(given: ModelSpec, wanted: ModelSpec) -> list[str]:
    """What the weights of `given` compute otherwise than `wanted`: the family if it is another, then a line a field."""
    family = [f"model.name = {wanted.family.name!r}: it is a {given.family.name}"]
    if given.family.model is not wanted.family.model:
        return family
    found, asked = computed(given.config), computed(wanted.config)
    wrong = {key for key in found.keys() | asked.keys() if found.get(key) != asked.get(key)}
    # a section of another kind has other fields too, which goes without saying
    others = tuple(key.removesuffix("kind") for key in wrong if key.endswith(".kind"))
    lines = [
        f"model.{key} = {asked.get(key)!r}: it has {found.get(key)!r}"
        for key in sorted(wrong)
        if key.endswith(".kind") or not key.startswith(others)
    ]
    return [*family, *lines] if lines and given.family.name != wanted.family.name else lines


def _remedies(given: ModelSpec, wanted: ModelSpec) -> list[str]:
    """What to do where they differ in parts alone that one of them does without."""
    grown = replace(wanted, config=ungrown(wanted.config, given.config))
    if not differences(given, grown):
        return ["set checkpoint.initial_load_grow = true: what it lacks then begins as in a fresh run"]
    has_modules = getattr(given.config, "mtp", None) is not None
    if has_modules and not differences(replace(given, config=replace(given.config, mtp=None)), wanted):
        return ["leave its modules of multi-token prediction away with `nanovl convert --without-mtp`"]
    return []


def tokenizer_folder(job: Job) -> Path | None:
    """The tokenizer that a job begins with: `tokenizer.path`, else that of the weights; None = one is to be trained.

    Raises CheckpointError.
    """
    if job.tokenizer.path:
        return Path(job.tokenizer.path)
    begin = job.checkpoint.initial_load_path
    return find_source(Path(begin)).tokenizer if begin else None


def vocabulary(job: Job, kept: Path | None = None) -> int:
    """Entries of the tokenizer in `kept`, if a run has it already, of the one that `job` begins with, or is to train.

    Raises ConfigError and CheckpointError where it cannot be read.
    """
    folder = kept if kept is not None and kept.exists() else tokenizer_folder(job)
    return job.tokenizer.vocab_size if folder is None else load_tokenizer(folder).vocab_size


def tokens_learnt(job: Job) -> tuple[Path, AnyTokenizer] | None:
    """The tokenizer that lies beside the weights to begin from; None = none does, or there are no such weights."""
    if not job.checkpoint.initial_load_path:
        return None
    try:
        folder = find_source(Path(job.checkpoint.initial_load_path)).tokenizer
        return folder, load_tokenizer(folder)
    except (CheckpointError, ConfigError):
        return None


def check_initial(job: Job) -> None:
    """Raises ConfigError and CheckpointError where a job cannot begin from `checkpoint.initial_load_path`.

    Looks at the names and shapes of weights, and needs no process group.
    """
    if not job.checkpoint.initial_load_path:
        return
    path = Path(job.checkpoint.initial_load_path)
    try:
        source = find_source(path)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.initial_load_path: {error}") from None
    tokenizer, room = _tokenizer(job, path, source), source.spec.config.vocab_size
    if tokenizer.vocab_size > room:
        whose, remedy = (
            (f"tokenizer.path = {job.tokenizer.path!r}", "leave it out to take the tokenizer of the weights")
            if job.tokenizer.path
            else (
                f"checkpoint.initial_load_path: the tokenizer in {source.tokenizer}",
                "take added tokens beyond that out of a copy of it, and name the copy in tokenizer.path",
            )
        )
        raise ConfigError(
            f"{whose}: has {tokenizer.vocab_size:,} entries, the weights at {path} {room:,}; {remedy}"
        )
    initial = find_initial(job, resolve_model(job.model, tokenizer.vocab_size))
    initial.source.weights(initial.source.spec)


def _tokenizer(job: Job, path: Path, source: Source) -> AnyTokenizer:
    if job.tokenizer.path:
        return load_tokenizer(job.tokenizer.path)
    try:
        return load_tokenizer(source.tokenizer)
    except (CheckpointError, ConfigError) as error:
        reason = error.mistakes[0] if isinstance(error, ConfigError) else error
        raise ConfigError(
            f"checkpoint.initial_load_path: {path} brings no tokenizer that can be read ({reason}); name the one its "
            "weights have learnt in tokenizer.path"
        ) from None


def _misfits(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor], but: Collection[str]) -> list[str]:
    """Tensors that are in one model alone, or of another shape, those of all layers folded; a line for each kind."""
    shapes = [
        f"{name} {tuple(held[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in held and held[name].shape != value.shape
    ]
    found = {
        "tensors that it lacks": [name for name in wanted if name not in held and name not in but],
        "tensors that the model lacks": [name for name in held if name not in wanted and name not in but],
        "tensors of another shape": shapes,
    }
    return [f"{what}: {shorten(names)}" for what, names in found.items() if names]
