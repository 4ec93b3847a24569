"""Hugging Face checkpoints: buffers with a rule travel, in float32, others begin anew; tied weights may stand twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovl.checkpoint.hf import load_hf_weights, save_hf
from nanovl.checkpoint.locate import find_source
from nanovl.checkpoint.tensors import named_weights
from nanovl.errors import CheckpointError
from nanovl.registry import family
from nanovl.spec import KeyGroup, KeyRule, ModelSpec

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def spec() -> ModelSpec:
    """Experts balanced by a bias that has a name on disk, as DeepSeek's, and by a loss that remembers loads."""
    found = family("qwen3_moe")
    assert found.hf is not None
    config = found.flavors["debug"]()
    config.num_hidden_layers = 2
    config.blocks["full"].ffn.load_balancing = "bias"
    config.blocks["full"].ffn.aux_loss_coef = 0.01
    rules = found.hf.key_rules
    bias = KeyRule(BIAS.replace("1", "{i}"), "layers.{i}.ffn.router.expert_bias")

    def with_bias(config: Any) -> Sequence[KeyRule | KeyGroup]:
        return [*rules(config), bias]

    hf = replace(found.hf, key_rules=with_bias, config_to_hf=lambda config: {})
    return ModelSpec(replace(found, hf=hf), config)


def drawn(spec: ModelSpec) -> torch.nn.Module:
    model = spec.family.model(spec.config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in named_weights(model).values():
            weight.normal_(generator=generator)
    return model


def test_buffers_with_a_rule_travel_in_float32(spec: ModelSpec, tmp_path: Path) -> None:
    model, again = drawn(spec), spec.family.model(spec.config)
    save_hf(tmp_path, named_weights(model), spec, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[BIAS], model.layers["1"].ffn.router.expert_bias)
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert not any("load" in key for key in stored)
    load_hf_weights(tmp_path, again, spec)
    for name, weight in named_weights(again).items():
        if name.endswith("router.load"):
            assert not weight.any(), name
        else:
            kind = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
            assert torch.equal(weight, named_weights(model)[name].to(kind).float()), name


def test_a_missing_buffer_is_an_error(spec: ModelSpec, tmp_path: Path) -> None:
    save_hf(tmp_path, named_weights(drawn(spec)), spec, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[BIAS]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"does not fit qwen3_moe:\n  missing {BIAS}$"):
        load_hf_weights(tmp_path, spec.family.model(spec.config), spec)


def test_a_tied_head_may_be_stored_once_more(tmp_path: Path) -> None:
    """As Qwen3-0.6B's file has it."""
    config = family("qwen3").flavors["debug"]()
    config.tie_word_embeddings = True
    tied = ModelSpec(family("qwen3"), config)
    model, again = drawn(tied), tied.family.model(config)
    save_hf(tmp_path, named_weights(model), tied, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    load_hf_weights(tmp_path, again, tied)
    for name, weight in named_weights(again).items():
        assert torch.equal(weight, named_weights(model)[name]), name

    stored["lm_head.weight"][3, 5] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is not equal to model.embed_tokens.weight, though"
    ):
        load_hf_weights(tmp_path, again, tied)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": '{"architectures": ['},
            r"d/config\.json: is not valid JSON: .* line 1 .*; copy it again",
        ),
        ({"config.json": "[1]"}, r"d/config\.json: \[1\] is no table of settings"),
        (
            {"config.json": '{"model_type": "qwen3"}'},
            r"config\.json: architectures is missing: wants a list with the cl",
        ),
        (
            {"config.json": '{"architectures": "Qwen3"}'},
            r"config\.json: architectures = 'Qwen3': wants a list with",
        ),
        ({"config.json": '{"job": {}}'}, "d: this run has no complete checkpoint yet"),
        ({"config.json": "{", "run.json": "{}"}, "d: this run has no complete checkpoint yet"),
        ({}, "d: neither a run folder, nor a checkpoint, nor a Hugging Face directory"),
    ],
)
def test_what_a_folder_is_instead_of_a_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "d").mkdir()
    for name, text in files.items():
        (tmp_path / "d" / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        _ = find_source(tmp_path / "d").spec


def test_a_cut_file_is_named_once(spec: ModelSpec, tmp_path: Path) -> None:
    model = drawn(spec)
    save_hf(tmp_path, named_weights(model), spec, torch.float32)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(CheckpointError) as error:
        load_hf_weights(tmp_path, model, spec)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: copy it again:",
        f"  model.safetensors is damaged: it has {len(whole) - 4} bytes of {len(whole)}",
    ]
