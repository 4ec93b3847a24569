"""OLMo 2 (arXiv:2501.00656).

Different from Llama: norms stand behind attention and MLP, inside the residual, x + norm(f(x)); queries and keys are
normed over all heads together; sizes up to 13B have a key head for every query head.
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
    rope_from_hf,
    rope_to_hf,
    same_or_refuse,
    sizes_from_hf,
    sizes_of,
    sizes_to_hf,
)
from nanovl.models.hf_keys import decoder_rules
from nanovl.spec import HuggingFaceSpec, ModelFamily

ARCHITECTURE = "Olmo2ForCausalLM"
ROPE = RopeConfig(theta=5e5)


def olmo2(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int = 128,
    vocab: int = 100352,
    rope: RopeConfig | None = ROPE,
    eps: float = 1e-6,
    context: int = 4096,
    tie: bool = False,
    bias: bool = False,
) -> DecoderConfig:
    """An OLMo 2 of any size."""
    mixer = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        qk_norm="full",
        qkv_bias=bias,
        o_bias=bias,
    )
    block = BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=ffn), norm_placement="post")
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"full": block},
        pattern=["full"],
        norm=NormConfig(eps=eps),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
    )


# sizes of the released checkpoints' config.json
FLAVORS = {
    "7b": partial(olmo2, layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32),
    "13b": partial(olmo2, layers=40, hidden=5120, ffn=13824, heads=40, kv_heads=40),
    "32b": partial(olmo2, layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8),
    "debug": partial(
        olmo2, layers=4, hidden=64, ffn=128, heads=4, kv_heads=4, head_dim=16, vocab=512, context=128
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu")
    return olmo2(**sizes_from_hf(hf), rope=rope_from_hf(hf), bias=hf.get("attention_bias", False))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Olmo2ForCausalLM cannot say the same."""
    mixer, _ = dense(config, ARCHITECTURE)
    plain = olmo2(**sizes_of(config, ARCHITECTURE), rope=mixer.rope, bias=mixer.qkv_bias)
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **sizes_to_hf(config, ARCHITECTURE, "olmo2"),
        **rope_to_hf(mixer.rope),
        "hidden_act": "silu",
        "attention_bias": mixer.qkv_bias,
    }


FAMILY = ModelFamily(
    name="olmo2",
    summary="OLMo 2: norms behind attention and MLP, queries and keys normed over all heads, SwiGLU",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "olmo2", config_from_hf, config_to_hf, decoder_rules),
)
