"""Name -> architecture: the only dynamic imports of the house."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from nanovl.config.check import has_tokenizer
from nanovl.config.load import load_job
from nanovl.config.schema import Job, Model
from nanovl.config.types import check_types, spelled
from nanovl.errors import ConfigError
from nanovl.spec import ModelFamily, ModelSpec

MODELS = {
    "nanochat": "nanovl.models.nanochat",
    "nanochat_v1": "nanovl.models.nanochat_v1",
    "qwen3": "nanovl.models.qwen3",
    "qwen3_moe": "nanovl.models.qwen3_moe",
    "qwen3_next": "nanovl.models.qwen3_next",
    "qwen3_5": "nanovl.models.qwen3_5",
    "qwen3_5_moe": "nanovl.models.qwen3_5_moe",
    "deepseek_v3": "nanovl.models.deepseek_v3",
    "deepseek_v32": "nanovl.models.deepseek_v32",
    "kimi_k2": "nanovl.models.kimi_k2",
    "glm4_moe": "nanovl.models.glm4_moe",
    "llama3": "nanovl.models.llama3",
    "olmo2": "nanovl.models.olmo2",
    "olmo3": "nanovl.models.olmo3",
    "smollm3": "nanovl.models.smollm3",
    "gemma3": "nanovl.models.gemma3",
    "gpt_oss": "nanovl.models.gpt_oss",
    "grok2": "nanovl.models.grok2",
}


def family(name: str) -> ModelFamily:
    """The family called `name`. Raises ConfigError with the nearest name."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(MODELS)}"
        raise ConfigError(f"model.name = {name!r}: no such architecture; {hint}")
    found: ModelFamily = import_module(MODELS[name]).FAMILY
    return found


def family_of(architecture: str, model_type: str) -> ModelFamily:
    """The family of a config.json: by its class, and by `model_type` where families share one; "" = it has none.

    Raises ConfigError where they do not belong together.
    """
    by_class: dict[str, dict[str, ModelFamily]] = {}
    for name in MODELS:
        found = family(name)
        if found.hf is not None:
            by_class.setdefault(found.hf.architecture, {})[found.hf.model_type] = found
    if architecture not in by_class:
        raise ConfigError(f"{architecture} is none of {', '.join(by_class)}")
    by_type = by_class[architecture]
    if len(by_type) == 1 and not model_type:
        return next(iter(by_type.values()))
    if model_type not in by_type:
        raise ConfigError(f"model_type = {model_type!r}: {architecture} wants {' or '.join(by_type)}")
    return by_type[model_type]


def sizes() -> list[str]:
    """Everything in the registry, as `family:flavor`."""
    return [f"{name}:{flavor}" for name in MODELS for flavor in family(name).flavors]


def read_job(files: Sequence[str | Path], flags: Sequence[str] = (), *, world_size: int = 1) -> Job:
    """The checked job of files and flags, its model section included. Raises ConfigError with all mistakes."""
    return load_job(files, flags, world_size=world_size, checks=(model_mistakes,))


def model_mistakes(job: Job) -> list[str]:
    """What is wrong with the `[model]` section, one line each."""
    try:
        mtp = getattr(resolve_model(job.model, trained_vocabulary(job)).config, "mtp", None)
    except ConfigError as error:
        return error.mistakes
    if mtp is None or mtp.num_layers < (length := job.training.seq_len):
        return []
    beyond = f"the last of them would predict beyond rows of training.seq_len = {length}"
    return [f"model.mtp.num_layers = {mtp.num_layers}: {beyond}; use fewer, or none"]


def trained_vocabulary(job: Job) -> int | None:
    """Entries of the tokenizer that `job` trains; None = it begins with one, whose size its files know."""
    return None if has_tokenizer(job) else job.tokenizer.vocab_size


def resolve_model(model: Model, vocab_size: int | None) -> ModelSpec:
    """The architecture of `[model]`: the flavor's config with the overrides laid over it.

    The vocabulary is the tokenizer's: `model.vocab_size` may only enlarge it. Without a tokenizer (None) it is the
    flavor's own. Raises ConfigError.
    """
    found = family(model.name)
    flavor = model.flavor or next(iter(found.flavors))
    if flavor not in found.flavors:
        near = difflib.get_close_matches(f"{found.name}:{flavor}", sizes(), 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(found.flavors)}"
        raise ConfigError(f"model.flavor = {flavor!r}: {found.name} has no such size; {hint}")
    given = {} if vocab_size is None else {"vocab_size": vocab_size}
    base = asdict(found.flavors[flavor]())
    try:
        config = _config(found, _overlay(base, {**given, **model.overrides}), base)
    except ConfigError as error:
        raise ConfigError(_unknown_blocks_named(error.mistakes, base, model.overrides)) from None
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.vocab_size} is below the tokenizer's {vocab_size}; leave it out"
        )
    return ModelSpec(found, config, flavor)


def spec_from_dict(data: dict[str, Any]) -> ModelSpec:
    """The architecture that a checkpoint's meta.json records, whatever defaults have become since."""
    found = family(data["name"])
    return ModelSpec(found, _config(found, data["config"], {}), data.get("flavor", ""))


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """`spec` as it stands in meta.json: the family's name and every field of its config."""
    return {"name": spec.family.name, "flavor": spec.flavor, "config": asdict(spec.config)}


def _config(found: ModelFamily, data: dict[str, Any], usual: Mapping[str, Any]) -> Any:
    checked = check_types(found.config, spelled(found.config, data), {}, prefix="model.", usual=usual)
    wrong = list(checked.mistakes)
    if checked.built is not None:
        try:
            checked.built.validate()
        except ConfigError as error:
            wrong += checked.unaffected([f"model.{m}" for m in error.mistakes])
    if wrong:
        raise ConfigError(wrong)
    return checked.built


def _unknown_blocks_named(mistakes: list[str], base: dict[str, Any], over: dict[str, Any]) -> list[str]:
    """`mistakes`, with one line for a block that the flavor lacks and nobody wrote whole, which is a misspelt one."""
    blocks = over.get("blocks")
    known = list(base.get("blocks", {}))
    for name in blocks if isinstance(blocks, dict) else ():
        start = f"model.blocks.{name}."
        lacking = [m for m in mistakes if m.startswith(start) and ": missing;" in m]
        if name not in known and lacking:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
            keys = ", ".join(m.removeprefix(start).partition(":")[0] for m in lacking)
            line = f"model.blocks.{name}: the flavor has no such block; {hint} A new one needs {keys} too"
            mistakes = [line, *(m for m in mistakes if m not in lacking)]
    return mistakes


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    if "kind" in base and over.get("kind", base["kind"]) != base["kind"]:
        return over  # a section of another kind: nothing of the old one belongs to it
    both = {
        k: _overlay(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in over.items()
    }
    return {**base, **both}
