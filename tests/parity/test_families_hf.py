"""Composed families against transformers: logits, gradients, greedy tokens, packed documents, checkpoints both ways.

Traps: class defaults of transformers are no released models, so every case says what it means. Rotations are nested by
layer type where layers differ: a flat one silently loses its scaling.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from nanovl.checkpoint.hf import KeyMap, load_hf_weights, save_hf, spec_of_directory
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


def rope(theta: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


def llama3_rope(factor: float = 8.0) -> dict[str, Any]:
    turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    return rope(5e5, "llama3", factor=factor, **turns)


def yarn(theta: float, **more: Any) -> dict[str, Any]:
    return rope(
        theta, "yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, **more
    )


def by_type(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": full, "sliding_attention": sliding}


@dataclass(frozen=True)
class Family:
    """A transformers class and configs of it: the first is for every run, the others are slow."""

    name: str
    cases: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)


SLIDING = {"sliding_window": 8}
FAMILIES = {
    "llama3": Family(
        "Llama",
        {
            "stretched": {"head_dim": 16, "rope_parameters": llama3_rope(), "rms_norm_eps": 1e-5},
            "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": rope(5e5)},
            "biased": {
                "attention_bias": True,
                "mlp_bias": True,
                "head_dim": 8,
                "rope_parameters": llama3_rope(32.0),
            },
            "linear": {"rope_parameters": rope(1e4, "linear", factor=4.0), "num_key_value_heads": 1},
            "yarn": {"rope_parameters": yarn(1e4, truncate=False), "head_dim": 16},
            "yarn mscale": {"rope_parameters": yarn(1e4, mscale=0.7, mscale_all_dim=1.0), "head_dim": 24},
        },
    ),
    "qwen3": Family(
        "Qwen3",
        {
            "yarn": {"head_dim": 16, "rope_parameters": yarn(1e6)},
            "biased": {"head_dim": 32, "attention_bias": True, "rope_parameters": rope(1e6)},
        },
    ),
    "olmo2": Family(
        "Olmo2",
        {
            "grouped": {"rope_parameters": rope(5e5)},
            "all heads": {"num_key_value_heads": 4, "rope_parameters": rope(1e4), "rms_norm_eps": 1e-6},
            "biased": {"attention_bias": True, "rope_parameters": rope(5e5), "tie_word_embeddings": True},
        },
    ),
    "olmo3": Family(
        "Olmo3",
        {
            "yarn": {"rope_parameters": by_type(yarn(5e5, attention_factor=1.2), rope(5e5)), **SLIDING},
            "all heads": {
                "num_key_value_heads": 4,
                "sliding_window": 3,
                "num_hidden_layers": 6,
                "rope_parameters": by_type(rope(5e5), rope(1e4)),
            },
            "other pattern": {
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "rope_parameters": by_type(yarn(5e5), rope(5e5)),
                **SLIDING,
            },
        },
    ),
    "smollm3": Family(
        "SmolLM3",
        {
            "tied": {"rope_parameters": rope(5e6), "tie_word_embeddings": True, "num_hidden_layers": 5},
            "untied": {"rope_parameters": rope(2e6), "tie_word_embeddings": False, "attention_bias": True},
            "other layers": {"rope_parameters": rope(5e6), "no_rope_layers": [0, 1, 1, 0], "mlp_bias": True},
        },
    ),
    "gemma3": Family(
        "Gemma3Text",
        {
            "linear": {
                "query_pre_attn_scalar": 24,
                "rope_parameters": by_type(rope(1e6, "linear", factor=8.0), rope(1e4)),
                **SLIDING,
            },
            "untied": {
                "query_pre_attn_scalar": 16,
                "num_hidden_layers": 8,
                "num_key_value_heads": 1,
                "tie_word_embeddings": False,
                "sliding_window": 5,
                "rope_parameters": by_type(rope(1e6), rope(1e4)),
            },
            "capped": {
                "query_pre_attn_scalar": 24,
                "final_logit_softcapping": 3.0,
                "attention_bias": True,
                "rope_parameters": by_type(rope(1e5), rope(1e4)),
                **SLIDING,
            },
        },
        {"head_dim": 16, "num_hidden_layers": 6, "attn_logit_softcapping": None},
    ),
}


def cases(seeds: int = 1) -> list[Any]:
    """(family, case, seed) of every family; all but the first of each are slow."""
    found = []
    for name, family in FAMILIES.items():
        for i, case in enumerate(family.cases):
            for seed in range(seeds):
                marks = [pytest.mark.slow] if i or seed else []
                found.append(pytest.param(name, case, seed, marks=marks, id=f"{name}-{case}-{seed}"))
    return found


def hf_model(name: str, case: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose weights, norms and biases are large enough for mistakes to show."""
    family = FAMILIES[name]
    values = {**SMALL, **family.common, **family.cases[case]}
    config = getattr(transformers, f"{family.name}Config")(**values)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family.name.removesuffix('Text')}ForCausalLM")(config)
    for parameter in model.parameters():
        start = parameter.mean().detach().round()  # 1 of norms that begin there
        nn.init.normal_(parameter, mean=float(start), std=0.1)
    return model.eval()


def imported(folder: Path) -> tuple[nn.Module, ModelSpec]:
    spec = spec_of_directory(folder)
    model = spec.family.model(spec.config)
    load_hf_weights(folder, model, spec)
    return model, spec


@cache
def pair(name: str, case: str, seed: int = 0) -> tuple[transformers.PreTrainedModel, nn.Module, ModelSpec]:
    """The same model, theirs and ours."""
    theirs = hf_model(name, case, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, spec = imported(Path(folder))
    assert spec.family.name == name
    return theirs, ours, spec


def random_tokens(seed: int, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "case", "seed"), cases(seeds=3))
def test_logits_and_all_gradients(name: str, case: str, seed: int) -> None:
    theirs, ours, spec = pair(name, case, seed)
    tokens = random_tokens(seed)
    expected, actual = theirs(tokens).logits, ours(tokens)
    assert (expected - actual).abs().max() <= 2e-5
    for model, logits in ((theirs, expected), (ours, actual)):
        model.zero_grad()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    names = KeyMap(spec.family.hf.key_rules(spec.config))  # type: ignore[union-attr]
    mine = dict(ours.named_parameters())
    seen = set()
    for theirs_name, parameter in theirs.named_parameters():
        rule, ours_name = names.to_ours(theirs_name)
        assert rule is not None, theirs_name
        wanted = parameter.grad if rule.to_ours is None else rule.to_ours(parameter.grad)
        assert (mine[ours_name].grad - wanted).norm() <= 1e-4 * wanted.norm(), ours_name
        seen.add(ours_name)
    assert seen == mine.keys()


@pytest.mark.parametrize(("name", "case", "seed"), cases())
def test_greedy_tokens(name: str, case: str, seed: int) -> None:
    theirs, ours, _ = pair(name, case)
    prompts = random_tokens(seed + 3, 12)
    expected = theirs.generate(prompts, max_new_tokens=20, do_sample=False)[:, 12:]
    completions = Engine(ours).generate(prompts.tolist(), max_tokens=20)
    assert [c.ids for c in completions] == expected.tolist()


@pytest.mark.parametrize(("name", "case", "seed"), cases())
def test_packed_documents_equal_separate_ones(name: str, case: str, seed: int) -> None:
    _, ours, _ = pair(name, case)
    tokens = random_tokens(seed + 1)[:1]
    positions = torch.cat((torch.arange(28), torch.arange(12)))[None]
    packed = ours(tokens, positions, (positions == 0).cumsum(1))
    separate = torch.cat((ours(tokens[:, :28]), ours(tokens[:, 28:])), dim=1)
    assert (packed - separate).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "case", "seed"), cases())
def test_checkpoint_returns_bit_equal_and_loads_in_transformers(
    tmp_path: Path, name: str, case: str, seed: int
) -> None:
    theirs, ours, spec = pair(name, case)
    save_hf(tmp_path, dict(ours.named_parameters()), spec, torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(theirs)
    for (key, a), (_, b) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    tokens = random_tokens(seed)
    assert torch.equal(theirs(tokens).logits, again(tokens).logits)  # config.json says the same
    back, spec_again = imported(tmp_path)
    assert spec_again.config == spec.config
    for key, value in back.named_parameters():
        assert torch.equal(value, ours.get_parameter(key)), key
