"""Qwen3 with experts (arXiv:2505.09388).

Different from dense Qwen3: every layer's MLP is 128 experts, of which a token takes 8, chosen by softmax over all and
weighed by the chosen scores over their sum; no shared expert. A config.json may leave some layers dense.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_config import (
    body_from_hf,
    body_of,
    decoder_to_hf,
    heads_of,
    no_windows,
    rope_from_hf,
    rope_to_hf,
    same_or_refuse,
    tiling,
)
from nanovl.models.hf_keys import ATTENTION, MLP, decoder_rules, expert_rules
from nanovl.models.qwen3 import ROPE, qwen3
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily

ARCHITECTURE = "Qwen3MoeForCausalLM"


def qwen3_moe(
    *,
    layers: int,
    hidden: int,
    expert_ffn: int,
    heads: int,
    kv_heads: int = 4,
    head_dim: int = 128,
    experts: int = 128,
    active: int = 8,
    normed: bool = True,
    dense_layers: Collection[int] = (),
    ffn: int = 0,
    vocab: int = 151936,
    rope: RopeConfig | None = ROPE,
    eps: float = 1e-6,
    context: int = 40960,
    tie: bool = False,
    bias: bool = False,
) -> DecoderConfig:
    """A Qwen3 with experts, of any size; `dense_layers` have an MLP of width `ffn` instead."""
    config = qwen3(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        rope=rope,
        eps=eps,
        context=context,
        tie=tie,
        bias=bias,
    )
    dense = config.blocks["full"]
    moe = MoeConfig(
        num_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=expert_ffn,
        norm_topk_prob=normed,
    )
    config.blocks = {"full": BlockConfig(mixer=dense.mixer, ffn=moe)}
    if dense_layers:
        config.blocks["dense"] = dense
        config.pattern = tiling(["dense" if i in dense_layers else "full" for i in range(layers)], ["full"])
    return config


# sizes of the released checkpoints' config.json
FLAVORS = {
    "30b-a3b": partial(qwen3_moe, layers=48, hidden=2048, expert_ffn=768, heads=32),
    "235b-a22b": partial(qwen3_moe, layers=94, hidden=4096, expert_ffn=1536, heads=64),
    "debug": partial(
        qwen3_moe,
        layers=4,
        hidden=64,
        expert_ffn=32,
        heads=8,
        head_dim=16,
        experts=8,
        active=2,
        vocab=512,
        context=128,
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu")
    no_windows(hf)
    layers, step = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1)
    # transformers 5 writes the first, released files have the second
    experts = hf["num_local_experts" if "num_local_experts" in hf else "num_experts"]
    hf.expect(num_experts=experts)
    dense = {i for i in range(layers) if (i + 1) % step} | set(hf.get("mlp_only_layers") or ())
    return qwen3_moe(
        expert_ffn=hf["moe_intermediate_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        experts=experts,
        active=hf["num_experts_per_tok"],
        normed=hf.get("norm_topk_prob", False),
        dense_layers=dense,
        ffn=hf["intermediate_size"],
        rope=rope_from_hf(hf),
        bias=hf.get("attention_bias", False),
        **body_from_hf(hf),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Qwen3MoeForCausalLM cannot say the same."""
    mixer, moe = parts(config)
    dense = [i for i, name in enumerate(config.layer_names()) if name == "dense"]
    ffn = config.blocks["dense"].ffn if dense else None
    width = ffn.intermediate_size if isinstance(ffn, MlpConfig) else moe.moe_intermediate_size
    plain = qwen3_moe(
        expert_ffn=moe.moe_intermediate_size,
        experts=moe.num_experts,
        active=moe.num_experts_per_tok,
        normed=moe.norm_topk_prob,
        dense_layers=dense,
        ffn=width,
        rope=mixer.rope,
        bias=mixer.qkv_bias,
        **heads_of(mixer),
        **body_of(config),
    )
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **decoder_to_hf(config, mixer, ARCHITECTURE, "qwen3_moe"),
        **rope_to_hf(mixer.rope),
        "intermediate_size": width,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "hidden_act": "silu",
        "attention_bias": mixer.qkv_bias,
        "use_sliding_window": False,
    }


def parts(config: DecoderConfig) -> tuple[AttentionConfig, MoeConfig]:
    """Attention and experts of the template `full`. Raises ConfigError where it has others."""
    block = config.blocks.get("full")
    if block is None or not isinstance(block.mixer, AttentionConfig) or not isinstance(block.ffn, MoeConfig):
        raise ConfigError(f"model.blocks: wants `full`, of attention and moe, as {ARCHITECTURE} has")
    return block.mixer, block.ffn


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map."""
    layer = {**ATTENTION, **MLP, "mlp.gate.weight": "ffn.router.weight"}
    return [*decoder_rules(config, layer), *expert_rules(parts(config)[1].num_experts)]


FAMILY = ModelFamily(
    name="qwen3_moe",
    summary="Qwen3 with experts: 8 of 128 a token, softmax router, no shared expert",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "qwen3_moe", config_from_hf, config_to_hf, key_rules),
)
