"""The kinds of folder that a model can come from. A new kind is one class, and one entry of `KINDS` in locate.py."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from nanovl.checkpoint.front_matter import read_facts
from nanovl.checkpoint.hf import mtp_tensors, open_hf, spec_of_directory, stored_in, text_of
from nanovl.checkpoint.manager import committed, load_weights, read_meta
from nanovl.checkpoint.safetensors_files import SINGLE, SafetensorsFolder
from nanovl.checkpoint.state import StateFolder
from nanovl.checkpoint.tensors import Tensors, Without, fill, same_names, under_our_names, weights_of
from nanovl.config.schema import Job
from nanovl.errors import CheckpointError, ConfigError
from nanovl.registry import spec_from_dict
from nanovl.run import Run
from nanovl.spec import ModelSpec


class Source(ABC):
    """Weights, tokenizer, and what else is known of a model on disk."""

    names: tuple[str, ...]
    """What users call folders of the kind."""

    def __init__(self, path: Path) -> None:
        """`path` is where the weights lie."""
        self.path = path

    @classmethod
    @abstractmethod
    def find(cls, path: Path) -> Source | None:
        """What `path`, which exists, means; None where it is of another kind. Raises CheckpointError."""

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """The architecture. Raises CheckpointError."""

    @abstractmethod
    def weights(self, spec: ModelSpec) -> Tensors:
        """All weights under our names, none read yet. Raises CheckpointError listing every one that does not fit."""

    def without_mtp(self) -> tuple[Source, list[str]]:
        """The same without modules of multi-token prediction, and the tensors that they are. Raises CheckpointError
        where there are none."""
        raise CheckpointError(f"{self.path}: has no modules of multi-token prediction to leave away")

    def text_only(self) -> tuple[Source, list[str]]:
        """The language model alone of one with images or sound, and the tensors that are not of it. Raises
        CheckpointError where there is nothing else."""
        raise CheckpointError(f"{self.path}: has nothing but text to take out")

    def fill(self, model: nn.Module, fresh: Collection[str] = (), unused: Collection[str] = ()) -> None:
        """Load the weights into `model`, plain, sharded, or a pipeline's part. It may have more, the tensors called
        `fresh`, and lack those called `unused`. Raises as `weights`."""
        fill(model, self.weights(self.spec))

    @property
    def tokenizer(self) -> Path:
        """The folder with its files."""
        return self.path

    @property
    def job(self) -> Job | None:
        """What trained it, where that is known."""
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """How it was made, by the keys of a checkpoint's meta.json."""
        return {}


class Checkpoint(Source):
    """One of ours, or the newest of a run; its weights are in DCP, or plain safetensors."""

    names = ("run folder", "checkpoint")

    @classmethod
    def find(cls, path: Path) -> Source | None:
        if (path / "meta.json").is_file():
            return cls(path)
        found = committed(path / "checkpoints") or committed(path)
        return cls(found[-1]) if found else None

    @cached_property
    def facts(self) -> dict[str, Any]:
        return read_meta(self.path)

    @cached_property
    def spec(self) -> ModelSpec:
        try:
            return spec_from_dict(self.facts["model"])
        except ConfigError as error:
            raise ConfigError(error.mistakes, str(self.path / "meta.json")) from None
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: not a complete checkpoint: meta.json says of no model: {error!r}; choose another step"
            ) from None

    @cached_property
    def stored(self) -> Tensors:
        """All tensors of the model. Raises CheckpointError."""
        return SafetensorsFolder(self.path) if self._is_plain else StateFolder(self.path / "state")

    def weights(self, spec: ModelSpec) -> Tensors:
        wanted = weights_of(spec)
        return under_our_names(self.stored, same_names(wanted), wanted, f"{self.path} does not fit the model")

    def without_mtp(self) -> tuple[Source, list[str]]:
        if getattr(self.spec.config, "mtp", None) is None:
            return super().without_mtp()
        less = Checkpoint(self.path)
        less.spec = replace(self.spec, config=replace(self.spec.config, mtp=None))
        names = sorted(weights_of(self.spec).keys() - weights_of(less.spec).keys())
        less.stored = Without(self.stored, names)
        return less, names

    def fill(self, model: nn.Module, fresh: Collection[str] = (), unused: Collection[str] = ()) -> None:
        if self._is_plain:
            super().fill(model, fresh, unused)
        else:
            load_weights(self.path, model, fresh, unused)  # each rank reads its own part

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def job(self) -> Job | None:
        run = Run(self.path)
        return run.read_job() if run.is_used() else None  # converted from elsewhere

    @property
    def _is_plain(self) -> bool:
        return (self.path / SINGLE).is_file()


class HuggingFace(Source):
    """config.json, safetensors and a tokenizer, as transformers writes them."""

    names = ("Hugging Face directory",)

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        """`config` is what to take for config.json where that has more than text."""
        super().__init__(path)
        self.config = config

    @classmethod
    def find(cls, path: Path) -> Source | None:
        try:
            said = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except OSError:
            return None
        except ValueError:
            said = None  # `spec` says so
        ours = (path / "run.json").is_file() or (isinstance(said, dict) and "job" in said)
        return None if ours else cls(path)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return read_facts(self.path)

    @cached_property
    def stored(self) -> Tensors:
        """The tensors as they lie there. Raises CheckpointError."""
        return stored_in(self.path)

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_of_directory(self.path, lambda: self.stored, self.config)

    def weights(self, spec: ModelSpec) -> Tensors:
        return open_hf(self.path, spec, self.stored)

    def without_mtp(self) -> tuple[Source, list[str]]:
        if not (names := mtp_tensors(self.path, self.stored, self.config)):
            return super().without_mtp()
        less = HuggingFace(self.path, self.config)
        less.stored = Without(self.stored, names)
        return less, names

    def text_only(self) -> tuple[Source, list[str]]:
        config, stored, left_away = text_of(self.path)
        less = HuggingFace(self.path, config)
        less.stored = stored
        return less, left_away
