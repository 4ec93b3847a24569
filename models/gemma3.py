"""Gemma 3 (arXiv:2503.19786), the text decoder.

Different from Llama: norms before and behind attention and MLP, their scales stored less one; queries and keys normed
by head; five of six layers see a window and rotate with base 1e4, the sixth sees all with base 1e6, slowed 8 times in
sizes from 4B on; GeGLU; embeddings times sqrt(hidden), tied with the head. The 27B divides scores by sqrt(168), not by
sqrt(head_dim).
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

ARCHITECTURE = "Gemma3ForCausalLM"
PATTERN = ("sliding", "sliding", "sliding", "sliding", "sliding", "full")
SLOWED = RopeConfig(theta=1e6, scaling=RopeScaling(kind="linear", factor=8.0))
LOCAL = RopeConfig(theta=1e4)


def gemma3(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int = 256,
    vocab: int = 262208,
    window: int | None = 1024,
    rope: RopeConfig | None = SLOWED,
    sliding_rope: RopeConfig | None = LOCAL,
    query_scalar: int | None = None,
    softcap: float | None = None,
    eps: float = 1e-6,
    context: int = 131072,
    tie: bool = True,
    bias: bool = False,
) -> DecoderConfig:
    """A Gemma 3 of any size; `rope` is that of full layers."""

    def block(rope: RopeConfig | None, window: int | None) -> BlockConfig:
        mixer = AttentionConfig(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            sliding_window=window,
            qk_norm="head",
            qkv_bias=bias,
            o_bias=bias,
            query_pre_attn_scalar=query_scalar,
        )
        mlp = MlpConfig(intermediate_size=ffn, activation="gelu_tanh")
        return BlockConfig(mixer=mixer, ffn=mlp, norm_placement="sandwich")

    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"sliding": block(sliding_rope, window), "full": block(rope, None)},
        pattern=list(PATTERN),
        norm=NormConfig(eps=eps, weight="zeros"),
        tie_word_embeddings=tie,
        embed_scale="sqrt_hidden_size",
        final_logit_softcapping=softcap,
        max_position_embeddings=context,
    )


# sizes of the released checkpoints' config.json
small = partial(
    gemma3, heads=4, kv_heads=1, vocab=262144, window=512, rope=RopeConfig(theta=1e6), context=32768
)
FLAVORS = {
    "270m": partial(small, layers=18, hidden=640, ffn=2048),
    "1b": partial(small, layers=26, hidden=1152, ffn=6912),
    "4b": partial(gemma3, layers=34, hidden=2560, ffn=10240, heads=8, kv_heads=4),
    "12b": partial(gemma3, layers=48, hidden=3840, ffn=15360, heads=16, kv_heads=8),
    "27b": partial(
        gemma3,
        layers=62,
        hidden=5376,
        ffn=21504,
        heads=32,
        kv_heads=16,
        head_dim=128,
        query_scalar=168,
    ),
    "debug": partial(
        gemma3,
        layers=6,
        hidden=64,
        ffn=128,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=512,
        window=32,
        context=128,
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    # transformers reads attn_logit_softcapping and does not use it
    hf.expect(
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
    ropes = layer_ropes(hf, full=hf.get("rope_theta", 1e6), sliding=hf.get("rope_local_base_freq", 1e4))
    sizes = sizes_from_hf(hf, tie=True)
    scalar = hf["query_pre_attn_scalar"]
    period = hf.get("_sliding_window_pattern", hf.get("sliding_window_pattern", 6))
    names = layer_types(hf, period=period)
    config = gemma3(
        **sizes,
        window=sliding_window(hf, names),
        rope=ropes["full"],
        sliding_rope=ropes["sliding"],
        query_scalar=None if scalar == sizes["head_dim"] else scalar,
        softcap=hf.get("final_logit_softcapping"),
        bias=hf.get("attention_bias", False),
    )
    config.pattern = tiling(names, PATTERN)
    return config


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Gemma3ForCausalLM cannot say the same."""
    mixer, _ = dense(config, ARCHITECTURE)
    plain = gemma3(
        **sizes_of(config, ARCHITECTURE),
        window=mixer.sliding_window,
        rope=dense(config, ARCHITECTURE, "full")[0].rope,
        sliding_rope=mixer.rope,
        query_scalar=mixer.query_pre_attn_scalar,
        softcap=config.final_logit_softcapping,
        bias=mixer.qkv_bias,
    )
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **sizes_to_hf(config, ARCHITECTURE, "gemma3_text"),
        **layer_types_to_hf(config, ARCHITECTURE),
        "query_pre_attn_scalar": mixer.query_pre_attn_scalar or mixer.head_dim,
        "final_logit_softcapping": config.final_logit_softcapping,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": mixer.qkv_bias,
    }


TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
}
"""Of transformers' Gemma3TextConfig."""

FAMILY = ModelFamily(
    name="gemma3",
    summary="Gemma 3 text: sandwich norms, windows on five of six layers, two rotations, GeGLU, scaled embeddings",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(
        ARCHITECTURE,
        "gemma3_text",
        config_from_hf,
        config_to_hf,
        decoder_rules,
        text_defaults=TEXT_DEFAULTS,
    ),
)
