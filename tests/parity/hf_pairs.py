"""One model twice, a transformers class and ours with the same weights, and what has to be equal between them.

A test file names its families and cases, and calls these. Traps: class defaults of transformers are no released
models, so every case says what it means.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from nanovl.checkpoint.hf import load_hf_weights, save_hf, spec_of_directory
from nanovl.checkpoint.key_map import KeyMap
from nanovl.checkpoint.tensors import named_weights
from nanovl.inference.engine import Engine
from nanovl.spec import ModelSpec

VOCAB, TOKENS = 131, 40
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
"""Of every case, unless it says otherwise."""
STARTS = {"A_log": -2.0}
"""Added to where parameters begin: decays from slow to fast."""
SPREADS = {"A_log": 1.0, "conv1d": 0.5}
"""Deviation of random parameters, where it is not 0.1."""


def rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


def yarn(theta: float, **more: Any) -> dict[str, Any]:
    given = {"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
    return rope(theta, "yarn", **{**given, **more})


@dataclass(frozen=True, eq=False)
class HfFamily:
    """A transformers class and configs of it: the first is for every run, the others are slow."""

    name: str
    """Of the class, without ForCausalLM."""
    cases: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    """Name of the config class where it is not that of the family and Config."""
    says: dict[str, Any] = field(default_factory=dict)
    """What released files have in config.json and transformers does not write."""
    limit: float = 2e-5
    """Largest distance of a logit."""
    length: int = TOKENS
    """Of rows that are compared."""
    documents: tuple[int, ...] = (28, 12)
    """Lengths of those that are packed into one row."""
    packed_limit: float = 1e-5
    """Largest distance of a logit between packed and separate ones."""


@dataclass(frozen=True)
class Pair:
    theirs: transformers.PreTrainedModel
    ours: nn.Module
    spec: ModelSpec


def cases(families: Mapping[str, HfFamily], seeds: int = 1) -> list[Any]:
    """(family, case, seed) of every family; all but the first of each are slow."""
    return [
        pytest.param(
            name, case, seed, marks=[pytest.mark.slow] if i or seed else [], id=f"{name}-{case}-{seed}"
        )
        for name, family in families.items()
        for i, case in enumerate(family.cases)
        for seed in range(seeds)
    ]


def hf_model(family: HfFamily, case: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose weights, norms, biases and buffers are large enough for mistakes to show."""
    config_class = getattr(transformers, family.config or f"{family.name}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family.name}ForCausalLM")(
        config_class(**{**SMALL, **family.common, **family.cases[case]})
    )
    for key, value in dict(model.named_parameters(), **persistent_buffers(model)).items():
        leaf = key.removesuffix(".weight").rpartition(".")[2]
        start = float(value.detach().mean().round()) + STARTS.get(leaf, 0.0)  # 1 of norms that begin there
        nn.init.normal_(value, mean=start, std=SPREADS.get(leaf, 0.1))
    return model.eval()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that checkpoints hold."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def imported(folder: Path) -> tuple[nn.Module, ModelSpec]:
    spec = spec_of_directory(folder)
    model = spec.family.model(spec.config)
    load_hf_weights(folder, model, spec)
    return model, spec


@cache
def pair(family: HfFamily, case: str, seed: int = 0) -> Pair:
    """The same model, theirs and ours."""
    theirs = hf_model(family, case, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        file = Path(folder, "config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **family.says}))
        return Pair(theirs, *imported(Path(folder)))


def random_tokens(seed: int, length: int = TOKENS, rows: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_our_layout(theirs: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Tensors of theirs under our names, as our key map reads them."""
    assert spec.family.hf is not None
    names = KeyMap(spec.family.hf.key_rules(spec.config))
    found: dict[str, Tensor] = {}
    for group in dict.fromkeys(names.group(theirs=key) for key in theirs):
        assert group is not None
        found |= zip(group.ours, group.to_ours([theirs[key] for key in group.theirs]), strict=True)
    return found


def assert_same_logits_and_gradients(
    of: Pair, seed: int, *, limit: float = 2e-5, length: int = TOKENS
) -> None:
    """Logits within `limit`, and the gradients of all parameters that have one, the same ones."""
    tokens = random_tokens(seed, length)
    expected, actual = of.theirs(tokens).logits, of.ours(tokens)
    assert (expected - actual).abs().max() <= limit
    for model, logits in ((of.theirs, expected), (of.ours, actual)):
        model.zero_grad()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs, found = (
        {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        for model in (of.theirs, of.ours)
    )
    wanted = in_our_layout(theirs, of.spec)
    assert wanted.keys() == found.keys()
    for key, gradient in found.items():
        assert (gradient - wanted[key]).norm() <= 1e-4 * wanted[key].norm(), key


def assert_same_greedy_tokens(of: Pair, seed: int, *, prompt: int = 12, **engine: Any) -> None:
    """20 tokens through our cache and theirs."""
    prompts = random_tokens(seed + 3, prompt)
    expected = of.theirs.generate(prompts, max_new_tokens=20, do_sample=False)[:, prompt:]
    completions = Engine(of.ours, **engine).generate(prompts.tolist(), max_tokens=20)
    assert [c.ids for c in completions] == expected.tolist()


def assert_packed_equals_separate(of: Pair, seed: int, *, lengths: tuple[int, ...], limit: float) -> None:
    """Documents in one row do not see each other."""
    tokens = random_tokens(seed + 1, sum(lengths), rows=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = of.ours(tokens, positions, (positions == 0).cumsum(1))
    separate = torch.cat([of.ours(part) for part in tokens.split(lengths, dim=1)], dim=1)
    assert (packed - separate).abs().max() < limit


def assert_checkpoint_returns(of: Pair, folder: Path, seed: int) -> None:
    """What we write transformers loads whole, with equal tensors and logits, and we load it back bit-equal."""
    save_hf(folder, named_weights(of.ours), of.spec, torch.float32)
    # the class of a family of vision models is not the one that AutoModelForCausalLM takes for its text config
    by_config = transformers.AutoModelForCausalLM if _is_auto(of.theirs) else type(of.theirs)
    again, info = by_config.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(of.theirs)
    expected, found = of.theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    tokens = random_tokens(seed, 20)
    assert torch.equal(of.theirs(tokens).logits, again(tokens).logits)  # config.json says the same
    back, spec_again = imported(folder)
    assert spec_again.config == of.spec.config
    for key, value in back.state_dict().items():
        assert torch.equal(value, of.ours.state_dict()[key]), key


def assert_stacked_experts_are_read(of: Pair, folder: Path) -> None:
    """transformers' layout in memory, [experts, 2 x inner, model], on disk."""
    of.theirs.save_pretrained(folder, save_original_format=False)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in load_file(folder / "model.safetensors"))
    again, _ = imported(folder)
    for key, value in again.state_dict().items():
        assert torch.equal(value, of.ours.state_dict()[key]), key


def _is_auto(model: transformers.PreTrainedModel) -> bool:
    return transformers.AutoModelForCausalLM._model_mapping.get(type(model.config), None) is type(model)
