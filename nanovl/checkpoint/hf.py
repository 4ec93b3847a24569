"""Hugging Face directories: config.json and safetensors, in and out, by the family's key map. Nothing is skipped."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovl.checkpoint.cut_files import CutFolder, is_cut
from nanovl.checkpoint.float8 import dequantized
from nanovl.checkpoint.key_map import KeyMap
from nanovl.checkpoint.safetensors_files import SafetensorsFolder, write_safetensors
from nanovl.checkpoint.tensors import (
    Called,
    Held,
    InDtype,
    Renamed,
    Tensors,
    Without,
    fill,
    tied_names,
    under_our_names,
    weights_of,
)
from nanovl.config.config_json import shown
from nanovl.errors import CheckpointError, ConfigError
from nanovl.registry import MODELS, family, family_of
from nanovl.spec import HuggingFaceSpec, ModelFamily, ModelSpec, MtpFiles


def read_config(folder: Path) -> dict[str, Any]:
    """`folder`/config.json. Raises CheckpointError."""
    file = folder / "config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: is not valid JSON: {error}; copy it again") from None
    if not isinstance(said, dict):
        raise CheckpointError(f"{file}: {shown(said)} is no table of settings; copy it again")
    return said


TEXT_NAMES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
"""How the names of a language model begin in a model with images, as transformers 5 and 4 write them, and alone."""
SHARED_NAMES = ("lm_head.", "mtp.")
"""How names begin that are the same in both."""


def text_of(folder: Path) -> tuple[dict[str, Any], Tensors, list[str]]:
    """The language model of a directory that has images or sound, too: its config.json, its tensors under the names
    that they have alone, and those that are left away. Raises CheckpointError where there is none."""
    said = read_config(folder)
    text = said.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{folder}/config.json: has no text_config, so there is no text to take out")
    families = [family(name).hf for name in MODELS]
    of_type = {files.model_type: files for files in families if files is not None}
    kind = text.get("model_type")
    if kind not in of_type:
        raise CheckpointError(
            f"{folder}/config.json: text_config.model_type = {shown(kind)}: is none of {', '.join(of_type)}"
        )
    kept = {key: said[key] for key in ("tie_word_embeddings", "quantization_config") if key in said}
    stored = SafetensorsFolder(folder)
    named = [(alone, name) for name in stored.described if (alone := _alone(name)) is not None]
    names = dict(named)
    if twice := [alone for alone, name in named if names[alone] != name]:
        raise CheckpointError(f"{folder}: twice, under two names: {', '.join(twice)}; take one of each away")
    left_away = sorted(stored.described.keys() - set(names.values()))
    config = {**kept, **of_type[kind].text_defaults, **text, "architectures": [of_type[kind].architecture]}
    return config, Called(stored, names), left_away


def _alone(name: str) -> str | None:
    for within, alone in TEXT_NAMES:
        if name.startswith(within):
            return alone + name.removeprefix(within)
    return name if name.startswith(SHARED_NAMES) else None


def stored_in(folder: Path, files: HuggingFaceSpec | None = None) -> Tensors:
    """The tensors in `folder` under the names they have there; `files` = those of its family, if it is known.

    Raises CheckpointError listing everything that is damaged.
    """
    cut_dim = (files or _config_of_directory(folder)[2]).cut_dim
    return CutFolder(folder, cut_dim) if cut_dim and is_cut(folder) else SafetensorsFolder(folder)


def spec_of_directory(
    folder: Path, stored: Callable[[], Tensors] | None = None, config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The architecture that `folder`/config.json names, or `config` if that is taken out of it; `stored()` = the
    tensors, for who looks through them.

    Raises CheckpointError where no family here computes it.
    """
    config, found, files = _config_of_directory(folder, config)
    try:
        if files.mtp is not None:
            # tensors alone know: transformers saves no modules, but their number; files of Qwen3-Next have one unsaid
            modules = _modules(stored() if stored else stored_in(folder, files), files.mtp, config)
            config[files.mtp.depth] = len(set(modules.values()))
        return ModelSpec(found, found.config_from_hf(config))
    except ConfigError as error:
        raise _in_config(folder, error) from None


def _config_of_directory(
    folder: Path, given: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], ModelFamily, HuggingFaceSpec]:
    config = read_config(folder) if given is None else dict(given)
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise CheckpointError(
            f"{folder}/config.json: architectures {f'= {shown(named)}' if named else 'is missing'}: wants a list with "
            'the class of a language model, such as ["Qwen3ForCausalLM"]'
        )
    architecture = named[0]
    if also := [key for key in ("vision_config", "audio_config") if config.get(key)]:
        raise CheckpointError(
            f"{folder}/config.json: {architecture} has more than text ({', '.join(also)}), which nothing here "
            "computes, so those weights would be lost; `nanovl convert --text-only` takes the language model out"
        )
    try:
        found = family_of(architecture, config.get("model_type") or "")
    except ConfigError as error:
        raise _in_config(folder, error) from None
    return config, found, _hf(found)


def _in_config(folder: Path, error: ConfigError) -> CheckpointError:
    head, lines = f"{folder}/config.json: ", error.mistakes
    return CheckpointError(head + (lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)))


def mtp_tensors(folder: Path, stored: Tensors, config: Mapping[str, Any] | None = None) -> list[str]:
    """What of `stored`, the tensors in `folder`, belongs to modules of multi-token prediction; `config` as above."""
    config, _, files = _config_of_directory(folder, config)
    return [] if files.mtp is None else [*_modules(stored, files.mtp, config)]


def _modules(stored: Tensors, files: MtpFiles, config: Mapping[str, Any]) -> dict[str, int]:
    """Tensor of a module of multi-token prediction -> the module."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return {}  # refused where the config is read
    places = {name: files.module(name, layers) for name in stored.described}
    return {name: place for name, place in places.items() if place is not None}


def open_hf(folder: Path, spec: ModelSpec, stored: Tensors | None = None) -> Renamed:
    """The weights in `folder`'s safetensors as `spec` has them, under our names, none read yet; `stored` = the tensors
    there, if they were looked through.

    Raises CheckpointError listing every tensor that is unknown, missing or of another shape.
    """
    files = _hf(spec.family)
    rules = files.key_rules(spec.config)
    stored = stored_in(folder, files) if stored is None else stored
    try:
        stored = dequantized(stored, read_config(folder))
        stored = _less_tied_copies(stored, KeyMap(rules), spec)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return under_our_names(stored, rules, exchanged(spec), f"{folder} does not fit {spec.family.name}")


def _less_tied_copies(stored: Tensors, names: KeyMap, spec: ModelSpec) -> Tensors:
    """`stored` without what a tied weight is called a second time: some files hold it under both names.

    Raises CheckpointError where the two differ.
    """
    copies = set()
    for second, first in tied_names(spec).items():
        copy, original = names.group_of(second).theirs[0], names.group_of(first).theirs[0]
        if stored.described.keys() >= {copy, original}:
            if not torch.equal(stored.read(copy), stored.read(original)):
                raise CheckpointError(
                    f"{copy} is not equal to {original}, though config.json ties them; "
                    "set tie_word_embeddings to false there"
                )
            copies.add(copy)
    return Without(stored, copies) if copies else stored


def exchanged(spec: ModelSpec) -> dict[str, Tensor]:
    """The weights of `spec` that Hugging Face checkpoints hold, on the meta device: all parameters, and the buffers for
    which the key map has a rule. Other buffers, such as loads last seen by routers, begin anew."""
    names = KeyMap(_hf(spec.family).key_rules(spec.config))
    weights = weights_of(spec)
    return {
        n: w for n, w in weights.items() if isinstance(w, nn.Parameter) or names.group(ours=n) is not None
    }


def load_hf_weights(folder: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Fill `model` (plain, sharded, or a pipeline's part) from the safetensors of `folder`. Raises as `open_hf`."""
    fill(model, open_hf(folder, spec))


def under_their_names(weights: Tensors, spec: ModelSpec) -> Renamed:
    """`weights` of `spec` as Hugging Face names and arranges them. Raises CheckpointError where it has no format."""
    names = KeyMap(_hf(spec.family).key_rules(spec.config))
    return Renamed(weights, dict.fromkeys(map(names.group_of, exchanged(spec))), to_ours=False)


def config_of(spec: ModelSpec, weights: Tensors) -> dict[str, Any]:
    """config.json of `weights`. Raises CheckpointError, and ConfigError where transformers' class differs."""
    config_to_hf = _hf(spec.family).config_to_hf
    if config_to_hf is None:
        raise _no_class(spec.family)
    return {
        **config_to_hf(spec.config),
        "dtype": str(main_dtype(weights)).removeprefix("torch."),
    }


def main_dtype(weights: Tensors) -> torch.dtype:
    """The dtype of most numbers."""
    counts: Counter[torch.dtype] = Counter()
    for value in weights.described.values():
        counts[value.dtype] += value.numel()
    return counts.most_common(1)[0][0]


def save_hf(folder: Path, weights: Mapping[str, Tensor], spec: ModelSpec, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors that `AutoModelForCausalLM` loads, from `weights` as of `named_weights`.

    Parameters are written in `dtype`, buffers in float32, whose precision their users need.
    """
    held = InDtype(Held(weights), kinds(spec, dtype))
    config, renamed = config_of(spec, held), under_their_names(held, spec)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder, renamed, sys.maxsize, {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def kinds(spec: ModelSpec, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """What each weight is written in: parameters in `dtype` (None = as they are), buffers always in float32."""
    found = {n: dtype if isinstance(w, nn.Parameter) else torch.float32 for n, w in weights_of(spec).items()}
    return {name: kind for name, kind in found.items() if kind is not None}


def _hf(found: ModelFamily) -> HuggingFaceSpec:
    if found.hf is None:
        raise _no_class(found)
    return found.hf


def _no_class(found: ModelFamily) -> CheckpointError:
    return CheckpointError(
        f"{found.name}: transformers has no such architecture, so there is no format to write"
    )
