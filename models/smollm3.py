"""SmolLM3 (Hugging Face, July 2025).

Different from Llama: every fourth layer has no rotation, so no positions at all (NoPE, arXiv:2501.18795).
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
    tiling,
)
from nanovl.models.hf_keys import decoder_rules
from nanovl.spec import HuggingFaceSpec, ModelFamily

ARCHITECTURE = "SmolLM3ForCausalLM"
ROPE = RopeConfig(theta=5e6)
PATTERN = ("rope", "rope", "rope", "nope")


def smollm3(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int = 4,
    head_dim: int = 128,
    vocab: int = 128256,
    rope: RopeConfig | None = ROPE,
    eps: float = 1e-6,
    context: int = 65536,
    tie: bool = True,
    bias: bool = False,
    mlp_bias: bool = False,
) -> DecoderConfig:
    """A SmolLM3 of any size."""

    def block(rope: RopeConfig | None) -> BlockConfig:
        mixer = AttentionConfig(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            qkv_bias=bias,
            o_bias=bias,
        )
        return BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=ffn, bias=mlp_bias))

    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"rope": block(rope), "nope": block(None)},
        pattern=list(PATTERN),
        norm=NormConfig(eps=eps, cast_before_scale=True),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
    )


FLAVORS = {
    "3b": partial(smollm3, layers=36, hidden=2048, ffn=11008, heads=16),
    "debug": partial(
        smollm3, layers=4, hidden=64, ffn=128, heads=8, kv_heads=4, head_dim=16, vocab=512, context=128
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu")
    no_windows(hf)
    bias, mlp_bias = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    config = smollm3(
        **sizes_from_hf(hf, tie=True), rope=rope_from_hf(hf, theta=2e6), bias=bias, mlp_bias=mlp_bias
    )
    interval = hf.get("no_rope_layer_interval", 4)
    # the name says the opposite: 1 is a layer that rotates
    rotates = hf.get("no_rope_layers") or [(i + 1) % interval for i in range(config.num_hidden_layers)]
    if hf.get("no_rope_layers"):
        hf.a_layer_each("no_rope_layers")
    config.pattern = tiling(["rope" if r else "nope" for r in rotates], PATTERN)
    return config


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where SmolLM3ForCausalLM cannot say the same."""
    mixer, ffn = dense(config, ARCHITECTURE)
    sizes = sizes_of(config, ARCHITECTURE)
    same_or_refuse(
        config, smollm3(**sizes, rope=mixer.rope, bias=mixer.qkv_bias, mlp_bias=ffn.bias), ARCHITECTURE
    )
    return {
        **sizes_to_hf(config, ARCHITECTURE, "smollm3"),
        **rope_to_hf(mixer.rope),
        "no_rope_layers": [int(name == "rope") for name in config.layer_names()],
        "hidden_act": "silu",
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": ffn.bias,
        "use_sliding_window": False,
    }


FAMILY = ModelFamily(
    name="smollm3",
    summary="SmolLM3: like Llama, every fourth layer without positions",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "smollm3", config_from_hf, config_to_hf, decoder_rules),
)
