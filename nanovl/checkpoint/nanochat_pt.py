"""Checkpoints of nanochat's own code: `model_000650.pt` beside `meta_000650.json`, and its tokenizer's folder.

The file of weights is a pickle, which torch's restricted reader takes: it makes tensors and runs nothing. They stay
mapped to the file until each is copied. Every family that nanochat once was is asked whether the tensors are its own.
Optimizer state is not read: it is cut by the number of processes that wrote it.
"""

from __future__ import annotations

import json
import pickle
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovl.checkpoint.sources import Source
from nanovl.checkpoint.tensors import Tensors, under_our_names, weights_of
from nanovl.errors import CheckpointError, ConfigError
from nanovl.registry import MODELS, family
from nanovl.spec import ModelSpec
from nanovl.tokenizer.files import PICKLE_FILE, TOKENIZER_FILE

_WEIGHTS = re.compile(r"model_(\d+)\.pt")


class PickledTensors(Tensors):
    """The tensors of a file that torch.save wrote, mapped into memory; no code in it runs."""

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError naming everything in `file` that is no tensor."""
        self._values = _tensors_of(_unpickled(file), file)
        self.described = {name: value.to("meta") for name, value in self._values.items()}

    def read(self, name: str) -> Tensor:
        return self._values[name]


class Nanochat(Source):
    """Weights, sizes and tokenizer as nanochat's own code writes them; the newest of a folder, or one that is named."""

    names = ("folder of nanochat's checkpoints",)

    @classmethod
    def find(cls, path: Path) -> Source | None:
        files = [path] if path.is_file() else [*path.glob("model_*.pt")]
        found = [file for file in files if _WEIGHTS.fullmatch(file.name)]
        return cls(max(found, key=_step_of)) if found else None

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The meta file, which has to be of the same step. Raises CheckpointError."""
        file, step = meta_file(self.path), _step_of(self.path)
        if not file.is_file():
            others = ", ".join(sorted(f.name for f in file.parent.glob("meta_*.json"))) or "no other"
            raise CheckpointError(
                f"{self.path} has no {file.name} beside it ({others} is there); both files belong to one step: "
                "copy it too"
            )
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}; copy it again") from None
        if not isinstance(meta, dict):
            raise CheckpointError(f"{file}: holds no object; copy it again")
        if meta.get("step", step) != step:  # files of reinforcement learning do not name it
            raise CheckpointError(f"{file}: is of step {meta['step']}, the weights are of step {step}")
        return meta

    @cached_property
    def stored(self) -> PickledTensors:
        """The tensors under nanochat's names. Raises CheckpointError."""
        return PickledTensors(self.path)

    @cached_property
    def spec(self) -> ModelSpec:
        shapes = {name: value.shape for name, value in self.stored.described.items()}
        try:
            for name in MODELS:
                found = family(name)
                config = found.nanochat.config_from_meta(self.meta, shapes) if found.nanochat else None
                if config is not None:
                    config.validate()
                    return ModelSpec(found, config)
        except ConfigError as error:
            listed = "".join(f"\n  {line}" for line in error.mistakes)
            raise CheckpointError(f"{meta_file(self.path)} and {self.path.name}:{listed}") from None
        raise CheckpointError(f"{self.path}: its tensors are those of no nanochat that is known here")

    def weights(self, spec: ModelSpec) -> Tensors:
        assert spec.family.nanochat is not None
        rules = spec.family.nanochat.key_rules(spec.config)
        what = f"{self.path} does not fit {spec.family.name}"
        return under_our_names(self.stored, rules, weights_of(spec), what)

    @property
    def tokenizer(self) -> Path:
        folder = self.path.absolute().parent
        # as repositories have it; beside the weights; as nanochat itself has it: <base>/base_checkpoints/d20/model_*.pt
        places = [folder / "tokenizer", folder, folder.parent.parent / "tokenizer"]
        for place in places:
            if any((place / name).is_file() for name in (TOKENIZER_FILE, PICKLE_FILE)):
                return place
        raise CheckpointError(
            f"{self.path}: no {PICKLE_FILE} or {TOKENIZER_FILE} in {', '.join(map(str, places))}; "
            "copy nanochat's tokenizer folder there"
        )

    @property
    def facts(self) -> dict[str, Any]:
        return {"step": _step_of(self.path), "nanochat": self.meta}


def meta_file(weights: Path) -> Path:
    """The file of sizes that belongs to a file of weights."""
    return weights.with_name(f"meta_{weights.stem.removeprefix('model_')}.json")


def _step_of(weights: Path) -> int:
    match = _WEIGHTS.fullmatch(weights.name)
    assert match, weights
    return int(match[1])


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"(?:WeightsUnpickler error:|Trying to load)\s*(.+)", str(error))
        raise CheckpointError(
            f"{file}: holds more than tensors, which could run code, so it is not read: "
            f"{reason[1] if reason else error}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{file}: damaged, or not written by torch.save: {str(error).splitlines()[0]}; copy it again"
        ) from None


def _tensors_of(state: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: is a {type(state).__name__}, not a dict of tensors")
    found: dict[str, Tensor] = {}
    wrong = []
    for key, value in state.items():
        name = str(key).removeprefix("_orig_mod.")  # of a compiled model
        if name in found:
            wrong.append(f"{name} is there twice, once with _orig_mod.")
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            wrong.append(f"{name} is no tensor of floating-point numbers")
        else:
            found[name] = value
    if wrong:
        raise CheckpointError(f"{file}:" + "".join(f"\n  {line}" for line in wrong))
    return found
