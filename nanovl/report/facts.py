"""What the files of a run folder say of it, in numbers; the words are in pages.py."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovl.config.schema import Job
from nanovl.errors import NanovlError, RunError
from nanovl.metrics import read_metrics
from nanovl.plots import median_after_first
from nanovl.run import Run, read_json

if TYPE_CHECKING:
    from nanovl.spec import ModelSpec

LOSS_RECORDS = 10
"""Logged steps whose mean stands for the training loss: one batch alone is noise."""


@dataclass(frozen=True)
class Architecture:
    """A model's size."""

    family: str
    flavor: str
    layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    without_embeddings: int


@dataclass(frozen=True)
class DataUse:
    """Fractions over all logged steps of rank 0."""

    utilisation: float
    """Positions of the rows that carried loss."""
    cropped: float
    """Tokens thrown away, of all that were read."""
    epoch: int
    """The furthest lane's at the end; 1 = the first pass."""


@dataclass(frozen=True)
class Facts:
    """One run. Numbers are None, lists and dicts empty, where the run did not get so far."""

    run: Run
    name: str
    job: Job
    sessions: list[dict[str, Any]]
    train: list[dict[str, Any]]
    """Records of metrics.jsonl with `train/loss`."""
    val: list[dict[str, Any]]
    """Records of metrics.jsonl with a finite `val/bpb`."""
    evaluation: dict[str, Any]
    """The newest of evals/ in which compressors were measured."""
    samples: list[dict[str, Any]]
    """Those of the last step that made some."""
    architecture: Architecture | str
    """Or why it is not known."""
    tokenizer: str
    """Hash of the tokenizer's file."""

    @property
    def last(self) -> dict[str, Any]:
        """The last training record, or one of zeros."""
        return self.train[-1] if self.train else {"step": 0, "tokens": 0, "seconds": 0.0, "flops": 0.0}

    @property
    def loss(self) -> float | None:
        """Mean of the last LOSS_RECORDS logged losses, nats per token."""
        tail = [r["train/loss"] for r in self.train[-LOSS_RECORDS:]]
        return statistics.fmean(tail) if tail else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the windows after the first."""
        return median_after_first([r["perf/tokens_per_second"] for r in self.train]) if self.train else None

    @property
    def mfu(self) -> float | None:
        """A fraction, median over the windows after the first; None also where the peak is not known."""
        known = [r["perf/mfu"] for r in self.train if r["perf/mfu"] is not None]
        return median_after_first(known) if known else None

    @property
    def peak_gib(self) -> float | None:
        return max((r["memory/peak_gib"] for r in self.train), default=None)

    @property
    def measured(self) -> dict[str, Any]:
        """The newest measurement that has compressors beside it, else the newest of all."""
        return self.evaluation or (self.val[-1] if self.val else {})

    @property
    def compressors(self) -> dict[str, float]:
        return dict(self.evaluation.get("compressors", {}))

    @property
    def gzip_ratio(self) -> float | None:
        """Bits per byte of the model / of gzip -9, on the same text."""
        return self.evaluation["val/bpb"] / self.compressors["gzip -9"] if self.compressors else None

    @property
    def data_use(self) -> DataUse | None:
        windows = [r for r in self.train if r.get("data/utilisation")]
        if not windows:
            return None
        tokens = sum(r["data/tokens"] for r in windows)
        positions = sum(r["data/tokens"] / r["data/utilisation"] for r in windows)
        # a window's data/cropped is c / (tokens + c)
        cropped = sum(r["data/tokens"] * r["data/cropped"] / (1 - r["data/cropped"]) for r in windows)
        return DataUse(tokens / positions, cropped / (tokens + cropped), round(self.last["data/epoch"]) + 1)


def read_facts(run: Run) -> Facts:
    """Everything about `run`. Raises RunError if it is no run, ConfigError for a job of another version."""
    from nanovl.checkpoint.locate import is_hugging_face

    if (run.folder / "meta.json").is_file():
        raise RunError(f"{run.folder} is a checkpoint, not a run; name the run folder above it")
    if is_hugging_face(run.folder):
        raise RunError(f"{run.folder} is a Hugging Face directory, not a run; name the run it came from")
    job = run.read_job()
    records = read_metrics(run.metrics)
    # a resumed run may stand before what a killed session measured and sampled: that is not its own
    reached = records[-1]["step"] if records else 0
    measured = [read_json(file) for file in (run.folder / "evals").glob("step_*.json")]
    complete = [e for e in measured if e.get("compressors") and e["step"] <= reached]
    return Facts(
        run=run,
        name=run.folder.resolve().name,
        job=job,
        sessions=run.sessions(),
        train=[r for r in records if "train/loss" in r],
        val=[r for r in records if math.isfinite(r.get("val/bpb", math.nan))],
        evaluation=max(complete, key=lambda e: e["step"], default={}),
        samples=_last_samples(
            [s for s in read_metrics(run.folder / "samples.jsonl") if s["step"] <= reached]
        ),
        architecture=_architecture(run, job),
        tokenizer=_hash(run.tokenizer / "tokenizer.json"),
    )


def _last_samples(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One a prompt: a step that a resumed run took again made them again."""
    latest = [s for s in samples if s["step"] == samples[-1]["step"]]
    return list({s["prompt"]: s for s in latest}.values())


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _architecture(run: Run, job: Job) -> Architecture | str:
    """Of the newest checkpoint, else of the job with the run's tokenizer; else why it is not known."""
    from nanovl.checkpoint.manager import committed, read_meta
    from nanovl.registry import resolve_model, spec_from_dict
    from nanovl.tokenizer.bpe import load_tokenizer

    checkpoints = committed(run.checkpoints)
    try:
        if checkpoints:
            spec = spec_from_dict(read_meta(checkpoints[-1])["model"])
        elif run.tokenizer.exists():
            spec = resolve_model(job.model, load_tokenizer(run.tokenizer).vocab_size)
        else:
            return "there is no checkpoint, and no tokenizer that says how large the vocabulary is"
    except NanovlError as error:
        return str(error)
    config, (total, rest) = spec.config, parameter_counts(spec)
    return Architecture(
        spec.family.name,
        spec.flavor,
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        total,
        rest,
    )


def parameter_counts(spec: ModelSpec) -> tuple[int, int]:
    """Parameters of the model, and without its embedding tables; a head tied to a table goes with it."""
    import torch

    with torch.device("meta"):
        model = spec.family.model(spec.config)
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))


def settings(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(dotted key, value, whether it differs from the default) of every setting of a job, or of a part."""
    for field in dataclasses.fields(part):
        value, key = getattr(part, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from settings(item, f"{key}.{index}.")
        elif key == "model.overrides":  # in a job file they stand in [model] itself
            yield from ((name, given, True) for name, given in _flat(value, "model."))
        else:
            factory = field.default_factory
            yield key, value, value != (field.default if factory is dataclasses.MISSING else factory())


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
