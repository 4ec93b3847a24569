"""The kinds of folder that a model can come from. A new kind is one class, and one entry of `KINDS` in locate.py."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from nanovl.checkpoint.hf import open_hf, spec_of_directory
from nanovl.checkpoint.manager import committed, load_weights, read_meta
from nanovl.checkpoint.safetensors_files import SINGLE, SafetensorsFolder
from nanovl.checkpoint.state import StateFolder
from nanovl.checkpoint.tensors import Tensors, fill, same_names, under_our_names, weights_of
from nanovl.config.schema import Job
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

    def fill(self, model: nn.Module, spec: ModelSpec, without: Collection[str] = ()) -> None:
        """Load the weights into `model`, plain, sharded, or a pipeline's part, which may have more: the tensors called
        `without`. Raises as `weights`."""
        fill(model, self.weights(spec))

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
        return spec_from_dict(self.facts["model"])

    def weights(self, spec: ModelSpec) -> Tensors:
        stored = SafetensorsFolder(self.path) if self._is_plain else StateFolder(self.path / "state")
        wanted = weights_of(spec)
        return under_our_names(stored, same_names(wanted), wanted, f"{self.path} does not fit the model")

    def fill(self, model: nn.Module, spec: ModelSpec, without: Collection[str] = ()) -> None:
        if self._is_plain:
            super().fill(model, spec)
        else:
            load_weights(self.path, model, without)  # each rank reads its own part

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def job(self) -> Job | None:
        return Run(self.path).read_job()

    @property
    def _is_plain(self) -> bool:
        return (self.path / SINGLE).is_file()


class HuggingFace(Source):
    """config.json, safetensors and a tokenizer, as transformers writes them."""

    names = ("Hugging Face directory",)

    @classmethod
    def find(cls, path: Path) -> Source | None:
        try:
            said = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return cls(path) if isinstance(said, dict) and "architectures" in said else None

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_of_directory(self.path)

    def weights(self, spec: ModelSpec) -> Tensors:
        return open_hf(self.path, spec)
