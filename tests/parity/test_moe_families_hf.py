"""Families with experts, for test_families_hf.py, and what they alone have.

Traps: transformers' own init leaves correction biases at 0, where a mistake in the choice would not show; and near ties
between experts would flip by rounding, so weights of routers are as large as others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hf_pairs import (
    HfFamily,
    assert_stacked_experts_are_read,
    cases,
    pair,
    random_tokens,
    rope,
    yarn,
)

from nanovl.cli import main
from nanovl.inference.load import load
from nanovl.registry import read_job
from nanovl.spec import expert_layers
from nanovl.trainer import train

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"

SIGMOID = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
HALF = rope(1e6, partial_rotary_factor=0.5)
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
    "deepseek_v3": HfFamily(
        "DeepseekV3",
        {
            "yarn": {"rope_parameters": yarn(1e4, mscale=1.0, mscale_all_dim=1.0)},
            "moonlight": {
                "q_lora_rank": None,
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 2,
                "num_experts_per_tok": 3,
                "routed_scaling_factor": 2.446,
                "rms_norm_eps": 1e-5,
                "rope_parameters": rope(5e4),
            },
            "biased": {
                "attention_bias": True,
                "norm_topk_prob": False,
                "first_k_dense_replace": 0,
                "tie_word_embeddings": True,
                "rope_parameters": yarn(1e4, mscale=0.7, mscale_all_dim=0.5),
            },
            "mostly dense": {
                "first_k_dense_replace": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
                "qk_rope_head_dim": 12,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 4,
                "rope_parameters": yarn(1e4),
            },
        },
        {**LATENT, **SIGMOID, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v32": HfFamily(
        "DeepseekV32",
        {
            "yarn": {"rope_parameters": yarn(1e4, mscale=1.0, mscale_all_dim=1.0), "index_topk": 6},
            "few keys": {"rope_parameters": rope(5e4), "index_topk": 1, "index_n_heads": 64},
            "more keys": {
                "attention_bias": True,
                "first_k_dense_replace": 0,
                "tie_word_embeddings": True,
                "norm_topk_prob": False,
                "rms_norm_eps": 1e-5,
                "index_head_dim": 8,
                "index_topk": 17,
                "rope_parameters": yarn(1e4, mscale=0.7, mscale_all_dim=0.5),
            },
            "all keys": {
                "first_k_dense_replace": 3,
                "index_topk": 200,
                "index_head_dim": 32,
                "rope_parameters": yarn(1e4),
            },
        },
        # with few index heads scores tie at 0, and both choose among the ties as it comes
        {
            **LATENT,
            **SIGMOID,
            "n_group": 4,
            "topk_group": 2,
            "index_n_heads": 32,
            "index_head_dim": 20,
        },
    ),
    "kimi_k2": HfFamily(
        "DeepseekV3",
        {
            "instruct": {"rope_parameters": yarn(5e4, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)},
            "later": {
                "rope_parameters": yarn(5e4, factor=64.0, mscale=1.0, mscale_all_dim=1.0),
                "n_routed_experts": 12,
                "num_experts_per_tok": 4,
                "rms_norm_eps": 1e-5,
            },
        },
        {**LATENT, **SIGMOID, "routed_scaling_factor": 2.827, "n_group": 1, "topk_group": 1},
        says={"model_type": "kimi_k2"},
    ),
    "glm4_moe": HfFamily(
        "Glm4Moe",
        {
            "air": {"attention_bias": True, "rope_parameters": HALF, "rms_norm_eps": 1e-5},
            "normed": {
                "attention_bias": True,
                "use_qk_norm": True,
                "first_k_dense_replace": 2,
                "num_key_value_heads": 1,
                "n_shared_experts": 2,
                "rope_parameters": HALF,
            },
            "groups": {
                "n_group": 4,
                "topk_group": 2,
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
                "rope_parameters": rope(1e4, partial_rotary_factor=0.25),
            },
        },
        {**SIGMOID, "head_dim": 16, "first_k_dense_replace": 1},
    ),
}


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_stacked_experts_are_read_too(tmp_path: Path, name: str, case: str, seed: int) -> None:
    assert_stacked_experts_are_read(pair(FAMILIES[name], case), tmp_path)


def test_biases_that_training_moved_reach_transformers_and_are_frozen_on_demand(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    flags = [*tiny_flags, "--model.name=deepseek_v3", "--model.flavor=debug", "--training.steps=2"]
    train(read_job([CONFIG], [*flags, f"--job.run_dir={tmp_path / 'run'}"]))
    hf = tmp_path / "hf"
    assert main(["convert", str(tmp_path / "run"), "--to", "hf", "--out", str(hf)]) == 0
    ours = load(tmp_path / "run", device="cpu").model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    bias = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    assert set(bias.mul(1000).round().tolist()) & {-2.0, 2.0}  # two steps of 0.001
    tokens = random_tokens(0)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 2e-5
    more = [f"--checkpoint.initial_load_path={hf}", "--model.blocks.moe.ffn.bias_update_speed=0"]
    train(read_job([CONFIG], [*flags, *more, f"--job.run_dir={tmp_path / 'tuned'}"]))
    tuned = load(tmp_path / "tuned", device="cpu").model
    for before, after in zip(expert_layers(ours), expert_layers(tuned), strict=True):
        assert torch.equal(before.router.expert_bias, after.router.expert_bias)
        assert not torch.equal(before.router.weight, after.router.weight)
