"""Checkpoints of nanochat's own code: `model_000650.pt` beside `meta_000650.json`, and its tokenizer's folder.

The file of weights is a pickle, which torch's restricted reader takes: it makes tensors and runs nothing. They stay
mapped to the file until each is copied. Every family that nanochat once was is asked whether the tensors are its own.
Optimizer state is not read: it is cut by the number of processes that wrote it.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovl.checkpoint.key_map import KeyMap
from nanovl.errors import CheckpointError, ConfigError
from nanovl.mesh import copy_full
from nanovl.registry import MODELS, family
from nanovl.spec import ModelSpec, NanochatSpec

_WEIGHTS = re.compile(r"model_(\d+)\.pt")


def is_nanochat(path: Path) -> bool:
    """Whether `path` is a folder of nanochat's checkpoints, or one file of weights in it."""
    if path.is_file():
        return _WEIGHTS.fullmatch(path.name) is not None
    return any(_WEIGHTS.fullmatch(file.name) for file in path.glob("model_*.pt"))


def weights_at(path: Path) -> Path:
    """The file of weights that `path` means: itself, or the one of most steps in the folder."""
    if path.is_file():
        return path
    return max((f for f in path.glob("model_*.pt") if _WEIGHTS.fullmatch(f.name)), key=_step_of)


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer of the checkpoint at `path` lies. Raises CheckpointError."""
    folder = weights_at(path).absolute().parent
    # as repositories have it; beside the weights; as nanochat itself has it: <base>/base_checkpoints/d20/model_*.pt
    places = [folder / "tokenizer", folder, folder.parent.parent / "tokenizer"]
    for place in places:
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.pkl")):
            return place
    listed = ", ".join(map(str, places))
    raise CheckpointError(
        f"{path}: no tokenizer.pkl or tokenizer.json in {listed}; copy nanochat's tokenizer folder there"
    )


def spec_of_nanochat(path: Path) -> ModelSpec:
    """The architecture of the checkpoint at `path`. Raises CheckpointError."""
    weights = weights_at(path)
    meta = read_meta(weights)
    shapes = {name: value.shape for name, value in read_tensors(weights).items()}
    try:
        for name in MODELS:
            found = family(name)
            config = found.nanochat.config_from_meta(meta, shapes) if found.nanochat else None
            if config is not None:
                config.validate()
                return ModelSpec(found, config)
    except ConfigError as error:
        listed = "".join(f"\n  {line}" for line in error.mistakes)
        raise CheckpointError(f"{_meta_of(weights)} and {weights.name}:{listed}") from None
    raise CheckpointError(f"{weights}: its tensors are those of no nanochat that is known here")


def read_meta(weights: Path) -> dict[str, Any]:
    """The meta file of the same step as `weights`. Raises CheckpointError."""
    file, step = _meta_of(weights), _step_of(weights)
    if not file.is_file():
        others = ", ".join(sorted(f.name for f in weights.parent.glob("meta_*.json"))) or "no other"
        raise CheckpointError(
            f"{weights} has no {file.name} beside it ({others} is there); both files belong to one step: copy it too"
        )
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}; copy it again") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{file}: holds no object; copy it again")
    # files of reinforcement learning do not name their step
    if meta.get("step", step) != step:
        raise CheckpointError(f"{file}: is of step {meta['step']}, the weights are of step {step}")
    return meta


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of `weights` by name, mapped into memory. Raises CheckpointError; runs no code of the file."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"(?:WeightsUnpickler error:|Trying to load)\s*(.+)", str(error))
        raise CheckpointError(
            f"{weights}: holds more than tensors, which could run code, so it is not read: "
            f"{reason[1] if reason else error}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{weights}: damaged, or not written by torch.save: {str(error).splitlines()[0]}; copy it again"
        ) from None
    found: dict[str, Tensor] = {}
    wrong = [] if isinstance(state, dict) else [f"it is a {type(state).__name__}, not a dict of tensors"]
    for key, value in state.items() if isinstance(state, dict) else ():
        name = str(key).removeprefix("_orig_mod.")  # of a compiled model
        if name in found:
            wrong.append(f"{name} is there twice, once with _orig_mod.")
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            wrong.append(f"{name} is no tensor of floating-point numbers")
        else:
            found[name] = value
    if wrong:
        raise CheckpointError(f"{weights}:" + "".join(f"\n  {line}" for line in wrong))
    return found


@torch.no_grad()
def load_nanochat_weights(path: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Fill `model` (plain, sharded, or a pipeline's part) from the checkpoint at `path`, one tensor at a time.

    Raises CheckpointError listing every tensor that is unknown, missing or of another shape.
    """
    weights = weights_at(path)
    tensors = read_tensors(weights)
    names = KeyMap(_files(spec).key_rules(spec.config))
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        whole = {name: p.shape for name, p in spec.family.model(spec.config).named_parameters()}
    found = {theirs: names.group(theirs=theirs) for theirs in tensors}
    groups = dict.fromkeys(g for g in found.values() if g is not None and whole.keys() >= set(g.ours))
    wrong = [f"unknown {theirs}" for theirs, group in found.items() if group not in groups]
    filled = {ours for group in groups for ours in group.ours}
    wrong += [f"missing {theirs}" for ours in whole.keys() - filled for theirs in names.group_of(ours).theirs]
    for group in groups:
        values = group.to_ours([tensors[theirs] for theirs in group.theirs])
        for ours, value in zip(group.ours, values, strict=True):
            if value.shape != whole[ours]:
                is_now = tuple(tensors[group.theirs[0]].shape)
                wrong.append(f"{group.theirs[0]} is {is_now}; {ours} wants {tuple(whole[ours])}")
                break
    if wrong:
        listed = "".join(f"\n  {line}" for line in sorted(set(wrong)))
        raise CheckpointError(f"{weights} does not fit {spec.family.name}:{listed}")
    for group in groups:
        values = group.to_ours([tensors[theirs] for theirs in group.theirs])
        for ours, value in zip(group.ours, values, strict=True):
            if ours in parameters:  # another stage of a pipeline may have it
                copy_full(parameters[ours], value)


def save_nanochat(folder: Path, parameters: Mapping[str, Tensor], spec: ModelSpec, step: int) -> None:
    """Write model_*.pt and meta_*.json as the first release of nanochat loads them.

    As there, matrices are float32, and the embedding is bfloat16, unless that would round it.
    """
    files = spec.family.nanochat
    if files is None or files.config_to_meta is None:
        raise CheckpointError(
            f"{spec.family.name}: only nanochat's first release, nanochat_v1, is written in its format"
        )
    meta = {"step": step, "model_config": files.config_to_meta(spec.config)}
    names = KeyMap(files.key_rules(spec.config))
    tensors: dict[str, Tensor] = {}
    for group in dict.fromkeys(names.group_of(ours) for ours in parameters):
        values = group.to_theirs([parameters[ours].detach() for ours in group.ours])
        tensors.update({t: v.float().contiguous() for t, v in zip(group.theirs, values, strict=True)})
    short = tensors["transformer.wte.weight"].bfloat16()
    if torch.equal(short.float(), tensors["transformer.wte.weight"]):
        tensors["transformer.wte.weight"] = short
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"model_{step:06d}.pt"
    torch.save(tensors, weights)
    _meta_of(weights).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _step_of(weights: Path) -> int:
    match = _WEIGHTS.fullmatch(weights.name)
    assert match, weights
    return int(match[1])


def _meta_of(weights: Path) -> Path:
    return weights.with_name(weights.name.replace("model_", "meta_").replace(".pt", ".json"))


def _files(spec: ModelSpec) -> NanochatSpec:
    assert spec.family.nanochat is not None
    return spec.family.nanochat
