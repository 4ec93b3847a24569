"""Families with experts against transformers: logits, gradients, greedy tokens, packing, checkpoints both ways.

Traps: transformers' own init leaves correction biases at 0, where a mistake in the choice would not show; and near ties
between experts would flip by rounding, so weights of routers are as large as others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_pairs import (
    HfFamily,
    assert_checkpoint_returns,
    assert_packed_equals_separate,
    assert_same_greedy_tokens,
    assert_same_logits_and_gradients,
    assert_stacked_experts_are_read,
    cases,
    pair,
    rope,
    yarn,
)

FAMILIES = {
    "qwen3_moe": HfFamily(
        "Qwen3Moe",
        {
            "normed": {"norm_topk_prob": True, "rope_parameters": rope(1e6)},
            "dense layers": {
                "mlp_only_layers": [0, 2],
                "norm_topk_prob": True,
                "tie_word_embeddings": True,
                "rope_parameters": yarn(1e6),
            },
            "sparse step": {
                "decoder_sparse_step": 2,
                "norm_topk_prob": False,
                "attention_bias": True,
                "num_key_value_heads": 1,
                "num_experts_per_tok": 3,
                "rope_parameters": rope(5e5),
            },
        },
        {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    ),
}


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES, seeds=3))
def test_logits_and_all_gradients(name: str, case: str, seed: int) -> None:
    of = pair(FAMILIES[name], case, seed)
    assert of.spec.family.name == name
    assert_same_logits_and_gradients(of, seed)


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_greedy_tokens(name: str, case: str, seed: int) -> None:
    assert_same_greedy_tokens(pair(FAMILIES[name], case), seed)


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_packed_documents_equal_separate_ones(name: str, case: str, seed: int) -> None:
    assert_packed_equals_separate(pair(FAMILIES[name], case), seed)


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_checkpoint_returns_bit_equal_and_loads_in_transformers(
    tmp_path: Path, name: str, case: str, seed: int
) -> None:
    assert_checkpoint_returns(pair(FAMILIES[name], case), tmp_path, seed)


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_stacked_experts_are_read_too(tmp_path: Path, name: str, case: str, seed: int) -> None:
    assert_stacked_experts_are_read(pair(FAMILIES[name], case), tmp_path)
