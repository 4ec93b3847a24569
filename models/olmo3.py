"""Olmo 3 (Ai2, November 2025).

Different from OLMo 2: three of four layers see 4096 tokens back; the fourth sees all, and it alone is stretched (YaRN)
for contexts beyond the 8192 tokens of pretraining. `7b` and `32b` are the released, stretched models.
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
    layer_ropes,
    layer_types,
    layer_types_to_hf,
    same_or_refuse,
    sizes_from_hf,
    sizes_of,
    sizes_to_hf,
    sliding_window,
    tiling,
)
from nanovl.models.hf_keys import decoder_rules
from nanovl.spec import HuggingFaceSpec, ModelFamily

ARCHITECTURE = "Olmo3ForCausalLM"
PATTERN = ("sliding", "sliding", "sliding", "full")
THETA = 5e5
ROPE = RopeConfig(theta=THETA)


def olmo3(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int = 128,
    vocab: int = 100278,
    window: int | None = 4096,
    rope: RopeConfig | None = ROPE,
    sliding_rope: RopeConfig | None = ROPE,
    eps: float = 1e-6,
    context: int = 8192,
    tie: bool = False,
    bias: bool = False,
) -> DecoderConfig:
    """An Olmo 3 of any size; `rope` is that of full layers."""

    def block(rope: RopeConfig | None, window: int | None) -> BlockConfig:
        mixer = AttentionConfig(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            sliding_window=window,
            qk_norm="full",
            qkv_bias=bias,
            o_bias=bias,
        )
        return BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=ffn), norm_placement="post")

    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"sliding": block(sliding_rope, window), "full": block(rope, None)},
        pattern=list(PATTERN),
        norm=NormConfig(eps=eps),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
    )


# sizes of the released checkpoints' config.json
STRETCHED = RopeConfig(
    theta=THETA, scaling=RopeScaling(kind="yarn", factor=8.0, attention_factor=1.2079441541679836)
)
released = partial(olmo3, rope=STRETCHED, context=65536)
FLAVORS = {
    "7b": partial(released, layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32),
    "32b": partial(released, layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8),
    "debug": partial(
        olmo3,
        layers=4,
        hidden=64,
        ffn=128,
        heads=4,
        kv_heads=4,
        head_dim=16,
        vocab=512,
        window=32,
        context=128,
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu")
    theta = hf.get("rope_theta", THETA)
    if "rope_parameters" not in hf and theta != THETA:
        # transformers 5.23 would take it for full layers alone
        hf.refuse("rope_theta", "of which layers? write rope_parameters for each type")
    ropes = layer_ropes(hf, full=theta, sliding=THETA)
    names = layer_types(hf, period=4)
    config = olmo3(
        **sizes_from_hf(hf),
        window=sliding_window(hf, names),
        rope=ropes["full"],
        sliding_rope=ropes["sliding"],
        bias=hf.get("attention_bias", False),
    )
    config.pattern = tiling(names, PATTERN)
    return config


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Olmo3ForCausalLM cannot say the same."""
    mixer, _ = dense(config, ARCHITECTURE)
    plain = olmo3(
        **sizes_of(config, ARCHITECTURE),
        window=mixer.sliding_window,
        rope=dense(config, ARCHITECTURE, "full")[0].rope,
        sliding_rope=mixer.rope,
        bias=mixer.qkv_bias,
    )
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **sizes_to_hf(config, ARCHITECTURE, "olmo3"),
        **layer_types_to_hf(config, ARCHITECTURE),
        "hidden_act": "silu",
        "attention_bias": mixer.qkv_bias,
    }


FAMILY = ModelFamily(
    name="olmo3",
    summary="Olmo 3: OLMo 2 with windows of 4096 on three of four layers, YaRN on the fourth",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "olmo3", config_from_hf, config_to_hf, decoder_rules),
)
