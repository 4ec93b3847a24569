"""Qwen3 (arXiv:2505.09388), dense sizes.

Different from Llama: every query and key head is RMS-normed, with a learned scale, before the rotation; head_dim is
128 whatever hidden_size / heads is; the rotation's base is 1e6. The sizes up to 4B tie head and embedding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_config import (
    dense,
    no_windows,
    rope_from_hf,
    rope_to_hf,
    same_or_refuse,
    sizes_from_hf,
    sizes_of,
    sizes_to_hf,
)
from nanovl.models.hf_keys import decoder_rules
from nanovl.spec import HuggingFaceSpec, ModelFamily

ARCHITECTURE = "Qwen3ForCausalLM"
ROPE = RopeConfig(theta=1e6)


def qwen3(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 151936,
    rope: RopeConfig | None = ROPE,
    eps: float = 1e-6,
    context: int = 40960,
    tie: bool = False,
    bias: bool = False,
) -> DecoderConfig:
    """A Qwen3 of any size."""
    mixer = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"full": BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=ffn))},
        pattern=["full"],
        norm=NormConfig(eps=eps, cast_before_scale=True),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
    )


# sizes of the released checkpoints' config.json
FLAVORS = {
    "0.6b": partial(qwen3, layers=28, hidden=1024, ffn=3072, heads=16, tie=True),
    "1.7b": partial(qwen3, layers=28, hidden=2048, ffn=6144, heads=16, tie=True),
    "4b": partial(qwen3, layers=36, hidden=2560, ffn=9728, heads=32, tie=True),
    "8b": partial(qwen3, layers=36, hidden=4096, ffn=12288, heads=32),
    "14b": partial(qwen3, layers=40, hidden=5120, ffn=17408, heads=40),
    "32b": partial(qwen3, layers=64, hidden=5120, ffn=25600, heads=64),
    "debug": partial(
        qwen3, layers=8, hidden=64, ffn=128, heads=8, kv_heads=4, head_dim=16, vocab=512, context=128
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu")
    no_windows(hf)
    return qwen3(**sizes_from_hf(hf), rope=rope_from_hf(hf), bias=hf.get("attention_bias", False))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Qwen3ForCausalLM cannot say the same."""
    mixer, _ = dense(config, ARCHITECTURE)
    plain = qwen3(**sizes_of(config, ARCHITECTURE), rope=mixer.rope, bias=mixer.qkv_bias)
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **sizes_to_hf(config, ARCHITECTURE, "qwen3"),
        **rope_to_hf(mixer.rope),
        "hidden_act": "silu",
        "attention_bias": mixer.qkv_bias,
        "use_sliding_window": False,
    }


FAMILY = ModelFamily(
    name="qwen3",
    summary="Qwen3 dense: grouped-query attention with normed queries and keys, SwiGLU, pre-norm",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "qwen3", config_from_hf, config_to_hf, decoder_rules),
)
