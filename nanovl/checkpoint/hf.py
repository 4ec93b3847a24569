"""Hugging Face directories: config.json and safetensors, in and out, by the family's key map. Nothing is skipped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovl.errors import CheckpointError, ConfigError
from nanovl.mesh import copy_full
from nanovl.registry import MODELS, family
from nanovl.spec import HuggingFaceSpec, KeyRule, ModelSpec


def spec_of_directory(folder: Path) -> ModelSpec:
    """The architecture that `folder`/config.json names. Raises CheckpointError where no family here computes it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
    except (OSError, json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json: names no architecture: {error!r}") from None
    known = {}
    for name in MODELS:
        found = family(name)
        if found.hf is not None:
            known[found.hf.architecture] = found
    if architecture not in known:
        raise CheckpointError(f"{folder}/config.json: {architecture} is none of {', '.join(known)}")
    found = known[architecture]
    try:
        return ModelSpec(found, _hf(found.hf).config_from_hf(config))
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json: has no {error}") from None
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None


@torch.no_grad()
def load_hf_weights(folder: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Fill `model` (plain or sharded) from the safetensors of `folder`, one tensor at a time.

    Raises CheckpointError listing every tensor that is unknown, missing or of another shape.
    """
    from safetensors import safe_open

    places = tensor_places(folder)
    names = KeyMap(_hf(spec.family.hf).key_rules(spec.config))
    parameters = dict(model.named_parameters())
    wrong, found = [], {}
    for theirs in places:
        rule, ours = names.to_ours(theirs)
        if rule is None or ours not in parameters:
            wrong.append(f"unknown {theirs}")
        else:
            found[theirs] = (rule, ours)
    wrong += [
        f"missing {names.to_theirs(name)}"
        for name in parameters.keys() - {ours for _, ours in found.values()}
    ]
    for file in sorted({places[theirs] for theirs in found}):
        with safe_open(file, framework="pt") as tensors:
            for theirs, (rule, ours) in found.items():
                if places[theirs] != file:
                    continue
                value = (
                    tensors.get_tensor(theirs)
                    if rule.to_ours is None
                    else rule.to_ours(tensors.get_tensor(theirs))
                )
                if value.shape != parameters[ours].shape:
                    wrong.append(
                        f"{theirs} is {tuple(value.shape)}, the model wants {tuple(parameters[ours].shape)}"
                    )
                elif not wrong:
                    copy_full(parameters[ours], value)
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit {spec.family.name}:" + "".join(f"\n  {line}" for line in sorted(wrong))
        )


def save_hf(folder: Path, parameters: Mapping[str, Tensor], spec: ModelSpec, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors that `AutoModelForCausalLM` loads."""
    from safetensors.torch import save_file

    if spec.family.hf is None:
        raise CheckpointError(
            f"{spec.family.name}: transformers has no such architecture, so there is no format to write"
        )
    config = {**spec.family.hf.config_to_hf(spec.config), "dtype": str(dtype).removeprefix("torch.")}
    names = KeyMap(spec.family.hf.key_rules(spec.config))
    tensors = {}
    for ours, value in parameters.items():
        rule = names.rule_of(ours)
        value = value if rule.to_theirs is None else rule.to_theirs(value)
        tensors[names.to_theirs(ours)] = value.to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_places(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of one model.safetensors or of the shards in its index. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if absent:
            raise CheckpointError(
                f"{folder}: model.safetensors.index.json names files that are not there: {', '.join(absent)}"
            )
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    try:
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    except SafetensorError as error:
        raise CheckpointError(f"{single}: damaged: {error}") from None


@dataclass(frozen=True)
class KeyMap:
    """A family's key rules, applied to whole names."""

    rules: list[KeyRule]

    def to_ours(self, theirs: str) -> tuple[KeyRule | None, str]:
        """The rule and our name for `theirs`; (None, "") where no rule matches."""
        for rule in self.rules:
            layer = _layer_in(rule.theirs, theirs)
            if layer is not None:
                return rule, rule.ours.replace("{i}", layer)
        return None, ""

    def rule_of(self, ours: str) -> KeyRule:
        """The rule for our name. Raises CheckpointError where there is none."""
        for rule in self.rules:
            if _layer_in(rule.ours, ours) is not None:
                return rule
        raise CheckpointError(f"{ours}: the family's key map has no rule for it")

    def to_theirs(self, ours: str) -> str:
        """Their name for ours."""
        rule = self.rule_of(ours)
        return rule.theirs.replace("{i}", _layer_in(rule.ours, ours) or "")


def _layer_in(pattern: str, name: str) -> str | None:
    """The number at {i} of `pattern` in `name`, "" where the pattern has none; None = no match."""
    match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), name)
    return None if match is None else (match[1] if match.groups() else "")


def _hf(spec: HuggingFaceSpec | None) -> HuggingFaceSpec:
    assert spec is not None
    return spec
