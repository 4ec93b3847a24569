"""What a path given by a user is: a run folder, one checkpoint, a Hugging Face directory, nanochat's."""

from __future__ import annotations

import difflib
from pathlib import Path

from nanovl.checkpoint.nanochat_pt import Nanochat
from nanovl.checkpoint.sources import Checkpoint, HuggingFace, Source
from nanovl.errors import CheckpointError

KINDS: tuple[type[Source], ...] = (Checkpoint, HuggingFace, Nanochat)
"""In the order in which a path is tried."""


def find_source(path: Path) -> Source:
    """The model that `path` means. Raises CheckpointError where it is none."""
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1)
        raise CheckpointError(
            f"{path}: no such folder" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    for kind in KINDS:
        if (found := kind.find(path)) is not None:
            return found
    if (path / "config.json").is_file():
        raise CheckpointError(f"{path}: this run has no complete checkpoint yet")
    if any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path}: has weights, but no config.json, which says of what model; copy it there"
        )
    names = [name for kind in KINDS for name in kind.names]
    raise CheckpointError(f"{path}: neither a {', nor a '.join(names)}")


def is_hugging_face(path: Path) -> bool:
    """Whether `path`/config.json is one of transformers'."""
    return HuggingFace.find(path) is not None
