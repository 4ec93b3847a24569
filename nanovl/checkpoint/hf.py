"""Hugging Face directories: config.json and safetensors, in and out, by the family's key map. Nothing is skipped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovl.errors import CheckpointError, ConfigError
from nanovl.mesh import copy_full
from nanovl.models.hf_config import MTP_LAYERS
from nanovl.registry import family_of
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelSpec

MTP_MODULE = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")
"""A tensor that each module of multi-token prediction has, and no layer."""


def spec_of_directory(folder: Path) -> ModelSpec:
    """The architecture that `folder`/config.json names. Raises CheckpointError where no family here computes it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
    except (OSError, json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json: names no architecture: {error!r}") from None
    try:
        config |= _modules_there_are(config, folder)
        found = family_of(architecture, config.get("model_type", ""))
        return ModelSpec(found, _hf(found.hf).config_from_hf(config))
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json: has no {error}") from None
    except ConfigError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None


def _modules_there_are(config: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """The depth of multi-token prediction, by the files: transformers leaves its modules out when it saves, and their
    number in config.json."""
    if not config.get(MTP_LAYERS):
        return {}
    places = [match[1] for name in tensor_places(folder) if (match := MTP_MODULE.fullmatch(name))]
    return {MTP_LAYERS: sum(int(place) >= config["num_hidden_layers"] for place in places)}


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """What checkpoints hold of `model`: parameters, a tied one under its first name, and persistent buffers."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def exchanged(spec: ModelSpec) -> dict[str, Tensor]:
    """The weights of `spec` that Hugging Face checkpoints hold, on the meta device: all parameters, and the buffers for
    which the key map has a rule. Other buffers, such as loads last seen by routers, begin anew."""
    names = KeyMap(_hf(spec.family.hf).key_rules(spec.config))
    with torch.device("meta"):
        weights = named_weights(spec.family.model(spec.config))
    return {
        n: w for n, w in weights.items() if isinstance(w, nn.Parameter) or names.group(ours=n) is not None
    }


@torch.no_grad()
def load_hf_weights(folder: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Fill `model` (plain, sharded, or a pipeline's part) from the safetensors of `folder`, one tensor at a time.

    Raises CheckpointError listing every tensor that is unknown, missing or of another shape.
    """
    from safetensors import safe_open

    places = tensor_places(folder)
    names = KeyMap(_hf(spec.family.hf).key_rules(spec.config))
    here = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = exchanged(spec).keys()
    found = {theirs: names.group(theirs=theirs) for theirs in places}
    # in one order on every rank: filling sharded parameters may ask the others
    groups = dict.fromkeys(g for g in found.values() if g is not None and whole >= set(g.ours))
    wrong = [f"unknown {theirs}" for theirs, group in found.items() if group not in groups]
    wrong += [f"missing {theirs}" for group in groups for theirs in group.theirs if theirs not in places]
    filled = [ours for group in groups for ours in group.ours]
    wrong += [f"missing {theirs}" for ours in whole - set(filled) for theirs in names.group_of(ours).theirs]
    wrong += [f"twice, in two layouts, {ours}" for ours in set(filled) if filled.count(ours) > 1]
    with ExitStack() as stack:
        files = {f: stack.enter_context(safe_open(f, framework="pt")) for f in sorted(set(places.values()))}
        for group in groups:
            # another stage of a pipeline may have them
            elsewhere = not here.keys() >= set(group.ours)
            if elsewhere or any(theirs not in places for theirs in group.theirs):
                continue
            try:
                values = group.to_ours([files[places[theirs]].get_tensor(theirs) for theirs in group.theirs])
            except CheckpointError as error:
                wrong.append(str(error))
                continue
            for ours, value in zip(group.ours, values, strict=True):
                if value.shape != here[ours].shape:
                    shapes = f"is {tuple(value.shape)}, the model wants {tuple(here[ours].shape)}"
                    wrong.append(f"{' + '.join(group.theirs[:2])} {shapes}")
                elif not wrong:
                    copy_full(here[ours], value)
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit {spec.family.name}:" + "".join(f"\n  {line}" for line in sorted(wrong))
        )


def save_hf(folder: Path, weights: Mapping[str, Tensor], spec: ModelSpec, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors that `AutoModelForCausalLM` loads, from `weights` as of `named_weights`.

    Parameters are written in `dtype`, buffers in float32, whose precision their users need.
    """
    from safetensors.torch import save_file

    if spec.family.hf is None:
        raise CheckpointError(
            f"{spec.family.name}: transformers has no such architecture, so there is no format to write"
        )
    config = {**spec.family.hf.config_to_hf(spec.config), "dtype": str(dtype).removeprefix("torch.")}
    names = KeyMap(spec.family.hf.key_rules(spec.config))
    wanted = exchanged(spec)
    tensors = {}
    for group in dict.fromkeys(names.group_of(ours) for ours in wanted):
        kind = dtype if any(isinstance(wanted[ours], nn.Parameter) for ours in group.ours) else torch.float32
        values = group.to_theirs([weights[ours] for ours in group.ours])
        tensors.update({t: v.to(kind).contiguous() for t, v in zip(group.theirs, values, strict=True)})
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


@dataclass(frozen=True, eq=False)
class Group:
    """A key rule at one layer: whole names."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_theirs: Callable[[Sequence[Tensor]], Sequence[Tensor]]


class KeyMap:
    """A family's key rules, applied to whole names."""

    def __init__(self, rules: Sequence[KeyRule | KeyGroup]) -> None:
        self._by_theirs: dict[str, KeyRule | KeyGroup] = {}
        self._by_ours: dict[str, KeyRule | KeyGroup] = {}
        self._groups: dict[tuple[int, str], Group] = {}
        for rule in rules:
            for theirs in _names(rule.theirs):
                self._by_theirs.setdefault(theirs, rule)
            for ours in _names(rule.ours):
                self._by_ours.setdefault(ours, rule)

    def group(self, *, theirs: str = "", ours: str = "") -> Group | None:
        """What either name is read or written with; None where no rule matches. Equal groups are the same object."""
        return self._find(self._by_theirs, theirs) if theirs else self._find(self._by_ours, ours)

    def group_of(self, ours: str) -> Group:
        """What `ours` is written with. Raises CheckpointError where there is no rule."""
        group = self.group(ours=ours)
        if group is None:
            raise CheckpointError(f"{ours}: the family's key map has no rule for it")
        return group

    def _find(self, rules: Mapping[str, KeyRule | KeyGroup], name: str) -> Group | None:
        for pattern, layer in _patterns(name):
            if (rule := rules.get(pattern)) is not None:
                if (id(rule), layer) not in self._groups:
                    self._groups[id(rule), layer] = _at(rule, layer)
                return self._groups[id(rule), layer]
        return None


def _names(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def _patterns(name: str) -> Iterator[tuple[str, str]]:
    """`name` as it is, which says most; then with each of its numbers as {i}, and that number."""
    yield name, ""
    for match in re.finditer(r"(?<=\.)\d+(?=\.)", name):
        yield f"{name[: match.start()]}{{i}}{name[match.end() :]}", match[0]


def _at(rule: KeyRule | KeyGroup, layer: str) -> Group:
    theirs, ours = (tuple(n.replace("{i}", layer) for n in _names(name)) for name in (rule.theirs, rule.ours))
    if isinstance(rule, KeyGroup):
        return Group(theirs, ours, rule.to_ours, rule.to_theirs)
    return Group(theirs, ours, _each(rule.to_ours), _each(rule.to_theirs))


def _each(convert: Callable[[Tensor], Tensor] | None) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    return lambda values: values if convert is None else [convert(value) for value in values]


def _hf(spec: HuggingFaceSpec | None) -> HuggingFaceSpec:
    assert spec is not None
    return spec
