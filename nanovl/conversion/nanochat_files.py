"""nanochat's own files, of its first release: what came after it is read, and not written."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nanovl.checkpoint.key_map import KeyMap
from nanovl.checkpoint.nanochat_pt import meta_file
from nanovl.checkpoint.tensors import Renamed, Tensors, weights_of
from nanovl.conversion.target import Model, Target
from nanovl.errors import CheckpointError
from nanovl.spec import NanochatSpec
from nanovl.tokenizer.bpe import Tokenizer
from nanovl.tokenizer.nanochat_pickle import write_pickled


class NanochatTarget(Target):
    """model_*.pt and meta_*.json, and the tokenizer's folder, whose place in nanochat is two folders up."""

    def tensors(self, model: Model) -> Tensors:
        files = _files(model)
        if not isinstance(model.tokenizer, Tokenizer):
            raise CheckpointError(f"{model.source.tokenizer}: holds a tokenizer that nanochat cannot read")
        _sizes(model, files)  # raises where nanochat's own code would compute something else
        names = KeyMap(files.key_rules(model.spec.config))
        return Renamed(
            model.weights, dict.fromkeys(map(names.group_of, weights_of(model.spec))), to_ours=False
        )

    def write(self, model: Model, tensors: Tensors, folder: Path, final: Path) -> None:
        facts = model.source.facts
        step = facts.get("step", 0)
        weights = folder / f"model_{step:06d}.pt"
        # a pickle is written whole, so here the model has to fit into memory
        torch.save({name: tensors.read(name).contiguous() for name in tensors.described}, weights)
        meta = {**facts.get("nanochat", {}), "step": step, "model_config": _sizes(model, _files(model))}
        meta_file(weights).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        assert isinstance(model.tokenizer, Tokenizer)
        write_pickled(model.tokenizer, folder / "tokenizer")


def _files(model: Model) -> NanochatSpec:
    found = model.spec.family.nanochat
    if found is None or found.config_to_meta is None:
        raise CheckpointError(
            f"{model.spec.family.name}: of nanochat's files only those of its first release, nanochat_v1, are written"
        )
    return found


def _sizes(model: Model, files: NanochatSpec) -> dict[str, int]:
    assert files.config_to_meta is not None
    sizes: dict[str, int] = files.config_to_meta(model.spec.config)
    return sizes
