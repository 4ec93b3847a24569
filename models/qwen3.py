"""Qwen3 (arXiv:2505.09388), dense sizes.

Different from Llama: every query and key head is RMS-normed, with a learned scale, before the rotation; head_dim is
128 whatever hidden_size / heads is; the rotation's base is 1e6. The sizes up to 4B tie head and embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from nanovl.config.schema import OptimizerGroup
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig
from nanovl.spec import HuggingFaceSpec, KeyRule, ModelFamily


def qwen3(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 151936,
    theta: float = 1e6,
    eps: float = 1e-6,
    context: int = 40960,
    tie: bool = False,
    qkv_bias: bool = False,
) -> DecoderConfig:
    """A Qwen3 of any size."""
    mixer = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=RopeConfig(theta=theta),
        qk_norm="head",
        qkv_bias=qkv_bias,
    )
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"full": BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=ffn))},
        pattern=["full"],
        norm=NormConfig(eps=eps),
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


def optimizer_groups(config: DecoderConfig) -> list[OptimizerGroup]:
    """AdamW for all; only matrices decay."""
    return [
        OptimizerGroup(match=r"layers\..*_proj\.weight|lm_head\.weight"),
        OptimizerGroup(match=r".*", weight_decay=0.0),
    ]


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The config of a `Qwen3ForCausalLM` config.json. Raises ConfigError for what this family does not compute."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    refused = {
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
    }
    if any(refused.values()):
        wrong = [
            f"{key} = {hf.get(key)!r} in config.json: this Qwen3 has no such part"
            for key, bad in refused.items()
            if bad
        ]
        raise ConfigError(wrong)
    return qwen3(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        ffn=hf["intermediate_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim", 128),
        vocab=hf["vocab_size"],
        theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
        eps=hf.get("rms_norm_eps", 1e-6),
        context=hf.get("max_position_embeddings", 32768),
        tie=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", False),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Qwen3ForCausalLM cannot say the same."""
    block = config.blocks["full"]
    mixer, ffn = block.mixer, block.ffn
    plain = qwen3(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=ffn.intermediate_size,
        heads=mixer.num_attention_heads,
        kv_heads=mixer.num_key_value_heads,
        head_dim=mixer.head_dim,
        vocab=config.vocab_size,
        theta=mixer.rope.theta if mixer.rope else 0.0,
        eps=config.norm.eps,
        context=config.max_position_embeddings,
        tie=config.tie_word_embeddings,
        qkv_bias=mixer.qkv_bias,
    )
    plain.initializer_range, plain.zero_init_outputs = config.initializer_range, config.zero_init_outputs
    if plain != config or mixer.qkv_bias:
        # transformers' attention_bias also puts one on o_proj, which Qwen3 here has not
        raise ConfigError(
            "model: changed beyond what Qwen3ForCausalLM computes; it cannot be written as a Qwen3 checkpoint"
        )
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": ffn.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": mixer.num_attention_heads,
        "num_key_value_heads": mixer.num_key_value_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "rope_theta": mixer.rope.theta if mixer.rope else None,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "use_sliding_window": False,
        "initializer_range": config.initializer_range,
    }


def key_rules(config: DecoderConfig) -> list[KeyRule]:
    """Names in a Qwen3 checkpoint and here."""
    layer = {
        "input_layernorm.weight": "mixer_pre_norm.weight",
        "post_attention_layernorm.weight": "ffn_pre_norm.weight",
        **{
            f"self_attn.{p}.weight": f"mixer.{p}.weight"
            for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        },
        **{f"mlp.{p}.weight": f"ffn.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")},
    }
    head = [] if config.tie_word_embeddings else [KeyRule("lm_head.weight", "lm_head.weight")]
    return [
        KeyRule("model.embed_tokens.weight", "embed_tokens.weight"),
        *(KeyRule(f"model.layers.{{i}}.{theirs}", f"layers.{{i}}.{ours}") for theirs, ours in layer.items()),
        KeyRule("model.norm.weight", "norm.weight"),
        *head,
    ]


FAMILY = ModelFamily(
    name="qwen3",
    summary="Qwen3 dense: grouped-query attention with normed queries and keys, SwiGLU, pre-norm",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=optimizer_groups,
    hf=HuggingFaceSpec("Qwen3ForCausalLM", config_from_hf, config_to_hf, key_rules),
)
