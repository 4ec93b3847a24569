"""Llama 3.1 and 3.2 (arXiv:2407.21783), the plainest of the field: what other families say they differ from.

Grouped-query attention, SwiGLU, norms in front, rotation of base 5e5 whose slow half is stretched for long contexts.
The sizes up to 3B tie head and embedding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig, RopeScaling
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_config import (
    dense,
    rope_from_hf,
    rope_to_hf,
    same_or_refuse,
    sizes_from_hf,
    sizes_of,
    sizes_to_hf,
)
from nanovl.models.hf_keys import decoder_rules
from nanovl.spec import HuggingFaceSpec, ModelFamily

ARCHITECTURE = "LlamaForCausalLM"
STRETCHED = RopeConfig(theta=5e5, scaling=RopeScaling(kind="llama3", factor=8.0))
"""For contexts up to 8 times the 8192 tokens of pretraining."""


def llama3(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 128256,
    rope: RopeConfig | None = STRETCHED,
    eps: float = 1e-5,
    context: int = 131072,
    tie: bool = False,
    bias: bool = False,
    mlp_bias: bool = False,
) -> DecoderConfig:
    """A Llama 3 of any size."""
    mixer = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        qkv_bias=bias,
        o_bias=bias,
    )
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"full": BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=ffn, bias=mlp_bias))},
        pattern=["full"],
        norm=NormConfig(eps=eps, cast_before_scale=True),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
    )


# sizes of the released checkpoints' config.json
small = partial(llama3, rope=RopeConfig(theta=5e5, scaling=RopeScaling(kind="llama3", factor=32.0)), tie=True)
FLAVORS = {
    "1b": partial(small, layers=16, hidden=2048, ffn=8192, heads=32, head_dim=64),
    "3b": partial(small, layers=28, hidden=3072, ffn=8192, heads=24),
    "8b": partial(llama3, layers=32, hidden=4096, ffn=14336, heads=32),
    "70b": partial(llama3, layers=80, hidden=8192, ffn=28672, heads=64),
    "405b": partial(llama3, layers=126, hidden=16384, ffn=53248, heads=128),
    "debug": partial(
        llama3, layers=4, hidden=64, ffn=128, heads=8, kv_heads=4, head_dim=16, vocab=512, context=128
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu")
    bias, mlp_bias = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    return llama3(**sizes_from_hf(hf), rope=rope_from_hf(hf), bias=bias, mlp_bias=mlp_bias)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where LlamaForCausalLM cannot say the same."""
    mixer, ffn = dense(config, ARCHITECTURE)
    plain = llama3(**sizes_of(config, ARCHITECTURE), rope=mixer.rope, bias=mixer.qkv_bias, mlp_bias=ffn.bias)
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **sizes_to_hf(config, ARCHITECTURE, "llama"),
        **rope_to_hf(mixer.rope),
        "hidden_act": "silu",
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": ffn.bias,
    }


FAMILY = ModelFamily(
    name="llama3",
    summary="Llama 3.1 and 3.2: grouped-query attention, SwiGLU, pre-norm, rotation stretched for long contexts",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "llama", config_from_hf, config_to_hf, decoder_rules),
)
