"""What a path given by a user is: a run folder, one checkpoint, or a Hugging Face directory."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import torch
from torch import nn

from nanovl.checkpoint.hf import load_hf_weights, spec_of_directory
from nanovl.checkpoint.manager import committed, load_weights, read_meta
from nanovl.errors import CheckpointError
from nanovl.registry import spec_from_dict
from nanovl.spec import ModelSpec


def resolve_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` means: itself, or the newest of a run folder; None for a Hugging Face directory.

    Raises CheckpointError where it is none of the three.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1)
        raise CheckpointError(
            f"{path}: no such folder" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    if (path / "meta.json").is_file():
        return path
    if is_hugging_face(path):
        return None
    found = committed(path / "checkpoints") or committed(path)
    if found:
        return found[-1]
    if (path / "config.json").is_file():
        raise CheckpointError(f"{path}: this run has no complete checkpoint yet")
    raise CheckpointError(f"{path}: neither a run folder, nor a checkpoint, nor a Hugging Face directory")


def is_hugging_face(path: Path) -> bool:
    """Whether `path`/config.json is one of transformers'."""
    try:
        return "architectures" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False


def spec_at(path: Path) -> ModelSpec:
    """The architecture of the weights at `path`. Raises CheckpointError."""
    checkpoint = resolve_checkpoint(path)
    return spec_of_directory(path) if checkpoint is None else spec_from_dict(read_meta(checkpoint)["model"])


@torch.no_grad()
def fill(model: nn.Module, path: Path, spec: ModelSpec) -> None:
    """Load the weights at `path` into `model`, plain or sharded. Raises CheckpointError listing every key at fault."""
    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        load_hf_weights(path, model, spec)
    else:
        load_weights(checkpoint, model)
