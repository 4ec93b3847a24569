"""Composed families without experts, and random small configs of them.

Traps: class defaults of transformers are no released models, so every case says what it means. Rotations are nested by
layer type where layers differ: a flat one silently loses its scaling.
"""

from __future__ import annotations

from typing import Any

from hf_pairs import HfFamily, rope, yarn


def llama3_rope(factor: float = 8.0) -> dict[str, Any]:
    turns = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    return rope(5e5, "llama3", factor=factor, **turns)


def by_type(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": full, "sliding_attention": sliding}


SLIDING = {"sliding_window": 8}
FAMILIES = {
    "llama3": HfFamily(
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
    "qwen3": HfFamily(
        "Qwen3",
        {
            "yarn": {"head_dim": 16, "rope_parameters": yarn(1e6)},
            "biased": {"head_dim": 32, "attention_bias": True, "rope_parameters": rope(1e6)},
        },
    ),
    "olmo2": HfFamily(
        "Olmo2",
        {
            "grouped": {"rope_parameters": rope(5e5)},
            "all heads": {"num_key_value_heads": 4, "rope_parameters": rope(1e4), "rms_norm_eps": 1e-6},
            "biased": {"attention_bias": True, "rope_parameters": rope(5e5), "tie_word_embeddings": True},
        },
    ),
    "olmo3": HfFamily(
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
    "smollm3": HfFamily(
        "SmolLM3",
        {
            "tied": {"rope_parameters": rope(5e6), "tie_word_embeddings": True, "num_hidden_layers": 5},
            "untied": {"rope_parameters": rope(2e6), "tie_word_embeddings": False, "attention_bias": True},
            "other layers": {"rope_parameters": rope(5e6), "no_rope_layers": [0, 1, 1, 0], "mlp_bias": True},
        },
    ),
    "gemma3": HfFamily(
        "Gemma3",
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
        "Gemma3TextConfig",
    ),
    "nanochat_v1": HfFamily(
        "NanoChat",
        {
            "released": {"rope_parameters": rope(1e4), "num_key_value_heads": 4},
            "grouped": {"rope_parameters": rope(1e5), "rms_norm_eps": 1.1920929e-07},
            "biased": {
                "rope_parameters": rope(1e4, "linear", factor=4.0),
                "attention_bias": True,
                "final_logit_softcapping": None,
            },
            "tied": {"rope_parameters": yarn(1e4), "tie_word_embeddings": True, "head_dim": 16},
        },
    ),
}
