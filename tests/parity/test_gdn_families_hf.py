"""The families with gated DeltaNet, for test_families_hf.py, and what they alone have.

Traps: transformers lets packed documents of these families see each other, so those are compared here with separate
ones of ours; and class defaults rotate with base 1e4, so every case says its rotation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_pairs import (
    HfFamily,
    assert_same_greedy_tokens,
    assert_stacked_experts_are_read,
    cases,
    imported,
    pair,
)
from safetensors.torch import load_file, save_file

from nanovl.errors import CheckpointError
from nanovl.registry import family

GATED = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "rms_norm_eps": 1e-4,  # the gated norm of an almost empty memory blows up rounding: by less so
    "max_position_embeddings": 256,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def rope(theta: float = 1e7, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": 0.5, **more}}


YARN = rope(1e6, "yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0)
BIASED = {"attention_bias": True, "num_key_value_heads": 1, "linear_num_key_heads": 4}
OTHER_LAYERS = {"layer_types": ["full_attention", "linear_attention", "linear_attention"]}
hybrid = partial(
    HfFamily,
    limit=5e-5,
    length=70,  # a chunk, and part of one
    documents=(66, 1, 2, 30),
    packed_limit=3e-5,  # other places in chunks, other rounding
)

FAMILIES = {
    "qwen3_next": hybrid(
        "Qwen3Next",
        {
            "quarter": rope(partial_rotary_factor=0.25),
            "biased": {**BIASED, **YARN, "norm_topk_prob": False},
            "other layers": {**OTHER_LAYERS, **rope(), "num_hidden_layers": 3, "linear_conv_kernel_dim": 3},
        },
        {**GATED, **EXPERTS},
    ),
    "qwen3_5": hybrid(
        "Qwen3_5",
        {
            "sections": {**rope(mrope_section=[2, 1, 1]), "linear_num_value_heads": 6},
            "tied": {**BIASED, **YARN, "tie_word_embeddings": True},
            "other layers": {**OTHER_LAYERS, **rope(1e4, partial_rotary_factor=1.0), "num_hidden_layers": 3},
        },
        GATED,
        "Qwen3_5TextConfig",
    ),
    "qwen3_5_moe": hybrid(
        "Qwen3_5Moe",
        {
            "sections": rope(mrope_section=[2, 1, 1]),
            "more heads": {**BIASED, **rope(1e6), "linear_num_value_heads": 8, "num_experts_per_tok": 3},
        },
        {**GATED, **EXPERTS},
        "Qwen3_5MoeTextConfig",
    ),
}


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_greedy_tokens_of_prompts_in_parts(name: str, case: str, seed: int) -> None:
    assert_same_greedy_tokens(pair(FAMILIES[name], case), seed, prompt=17, prefill_tokens=7)


def test_stacked_experts_are_read_too_but_not_beside_single_ones(tmp_path: Path) -> None:
    assert_stacked_experts_are_read(pair(FAMILIES["qwen3_5_moe"], "sections"), tmp_path)
    file = tmp_path / "model.safetensors"
    stacked = load_file(file)
    single = {
        f"model.layers.1.mlp.experts.{e}.down_proj.weight": stacked["model.layers.1.mlp.experts.down_proj"][e]
        for e in range(8)
    }
    save_file({**stacked, **{key: value.clone() for key, value in single.items()}}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"twice, in two layouts, layers\.1\.ffn\.experts\.down_proj"):
        imported(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    pair(FAMILIES["qwen3_next"], "quarter").theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.experts.5.up_proj.weight"]
    weights["mpt.fc.weight"] = torch.zeros(2)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        imported(tmp_path)
    assert "missing model.layers.2.mlp.experts.5.up_proj.weight" in str(error.value)
    assert "unknown mpt.fc.weight" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_flavors_are_as_large_as_those_of_transformers(name: str) -> None:
    found = family(name)
    assert found.hf is not None
    flavor = next(iter(found.flavors))
    said = found.hf.config_to_hf(found.flavors[flavor]())
    with torch.device("meta"):
        theirs = getattr(transformers, said["architectures"][0])(
            getattr(transformers, FAMILIES[name].config or "Qwen3NextConfig")(**said)
        )
        ours = found.model(found.flavors[flavor]())
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
    assert counts[0] == counts[1]
