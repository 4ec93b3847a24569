"""GPT-OSS (OpenAI, arXiv:2508.10925).

Different from Llama: every MLP is experts, 4 a token, chosen by the router's logits and weighed by a softmax over those
chosen; their SwiGLU is clamped; attention, router and experts have biases; every head has a sink, a score that takes
its share of the softmax and gives no value; every other layer sees 128 tokens back; contexts are stretched from 4096
(YaRN, its ramp not rounded to whole channels).

Checkpoints hold all experts' gate and up in one tensor, [experts, model, 2 x inner], channels of the two in turn, and
down as [experts, inner, model]; both are turned when read. Released files have these two in MXFP4, which is read as
bfloat16 and not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig, RopeScaling
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_config import (
    body_from_hf,
    body_of,
    decoder_to_hf,
    heads_of,
    layer_types,
    rope_from_hf,
    rope_parameters,
    rope_to_hf,
    same_or_refuse,
    sliding_window,
    tiling,
)
from nanovl.models.hf_keys import ATTENTION, decoder_rules
from nanovl.models.mxfp4 import from_mxfp4
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily

ARCHITECTURE = "GptOssForCausalLM"
PATTERN = ("sliding", "full")
ROPE = RopeConfig(
    theta=150_000.0,
    scaling=RopeScaling(kind="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False),
)


def gpt_oss(
    *,
    layers: int,
    hidden: int,
    expert_ffn: int,
    heads: int,
    kv_heads: int = 8,
    head_dim: int = 64,
    experts: int,
    active: int = 4,
    vocab: int = 201088,
    window: int | None = 128,
    rope: RopeConfig | None = ROPE,
    eps: float = 1e-5,
    context: int = 131072,
    tie: bool = False,
    bias: bool = True,
) -> DecoderConfig:
    """A GPT-OSS of any size; `bias` is that of attention."""

    def block(window: int | None) -> BlockConfig:
        mixer = AttentionConfig(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            sliding_window=window,
            qkv_bias=bias,
            o_bias=bias,
            sinks=True,
        )
        moe = MoeConfig(
            num_experts=experts,
            num_experts_per_tok=active,
            moe_intermediate_size=expert_ffn,
            activation="swiglu_clamped",
            bias=True,
            router_bias=True,
        )
        return BlockConfig(mixer=mixer, ffn=moe)

    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"sliding": block(window), "full": block(None)},
        pattern=list(PATTERN),
        norm=NormConfig(eps=eps),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
    )


# sizes of the released checkpoints' config.json
released = partial(gpt_oss, hidden=2880, expert_ffn=2880, heads=64)
FLAVORS = {
    "20b": partial(released, layers=24, experts=32),
    "120b": partial(released, layers=36, experts=128),
    "debug": partial(
        gpt_oss,
        layers=4,
        hidden=64,
        expert_ffn=32,
        heads=4,
        kv_heads=2,
        head_dim=16,
        experts=8,
        active=2,
        vocab=512,
        window=32,
        context=128,
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(
        hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0, experts_per_token=hf["num_experts_per_tok"]
    )
    names = layer_types(hf, period=len(PATTERN))
    config = gpt_oss(
        expert_ffn=hf["intermediate_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        experts=hf["num_local_experts"],
        active=hf["num_experts_per_tok"],
        window=sliding_window(hf, names),
        # transformers stretches where the file is silent
        rope=rope_from_hf(hf, theta=ROPE.theta, silent=rope_parameters(ROPE)),
        bias=hf.get("attention_bias", True),
        **body_from_hf(hf),
    )
    config.pattern = tiling(names, PATTERN)
    return config


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where GptOssForCausalLM cannot say the same."""
    block = config.blocks.get("sliding")
    if block is None or not isinstance(block.mixer, AttentionConfig) or not isinstance(block.ffn, MoeConfig):
        raise ConfigError(f"model.blocks: wants `sliding`, of attention and moe, as {ARCHITECTURE} has")
    mixer, moe = block.mixer, block.ffn
    plain = gpt_oss(
        expert_ffn=moe.moe_intermediate_size,
        experts=moe.num_experts,
        active=moe.num_experts_per_tok,
        window=mixer.sliding_window,
        rope=mixer.rope,
        bias=mixer.qkv_bias,
        **heads_of(mixer),
        **body_of(config),
    )
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **decoder_to_hf(config, mixer, ARCHITECTURE, "gpt_oss"),
        **rope_to_hf(mixer.rope),
        "rope_parameters": rope_parameters(mixer.rope),
        "layer_types": [f"{name}_attention" for name in config.layer_names()],
        "sliding_window": mixer.sliding_window,
        "intermediate_size": moe.moe_intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "attention_bias": mixer.qkv_bias,
    }


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map. Experts in MXFP4 are read too."""
    router = {f"mlp.router.{part}": f"ffn.router.{part}" for part in ("weight", "bias")}
    theirs, ours = "model.layers.{i}.mlp.experts", "layers.{i}.ffn.experts"
    gate_up = (f"{ours}.gate_proj", f"{ours}.up_proj")
    mxfp4 = [
        (tuple(f"{theirs}.{linear}_{part}" for part in ("blocks", "scales")), names)
        for linear, names in (("gate_up_proj", gate_up), ("down_proj", (f"{ours}.down_proj",)))
    ]
    return [
        *decoder_rules(config, {**ATTENTION, **router}),
        KeyGroup((f"{theirs}.gate_up_proj",), gate_up, lambda v: _apart(v[0].mT), lambda v: [_in_turn(v).mT]),
        KeyRule(f"{theirs}.down_proj", f"{ours}.down_proj", _turned, _turned),
        KeyGroup(
            (f"{theirs}.gate_up_proj_bias",),
            tuple(f"{name}_bias" for name in gate_up),
            lambda v: _apart(v[0]),
            lambda v: [_in_turn(v)],
        ),
        KeyRule(f"{theirs}.down_proj_bias", f"{ours}.down_proj_bias"),
        KeyGroup(*mxfp4[0], lambda v: _apart(from_mxfp4(*v)), _read_only),
        KeyGroup(*mxfp4[1], lambda v: [from_mxfp4(*v)], _read_only),
    ]


def _apart(both: Tensor) -> list[Tensor]:
    """[experts, 2 x inner, ...], gate and up in turn -> each alone."""
    return [both[:, ::2], both[:, 1::2]]


def _in_turn(values: Sequence[Tensor]) -> Tensor:
    """The reverse."""
    return torch.stack([*values], dim=2).flatten(1, 2)


def _turned(value: Tensor) -> Tensor:
    return value.mT


def _read_only(values: Sequence[Tensor]) -> list[Tensor]:
    raise AssertionError("the rules before these write experts unquantised")


FAMILY = ModelFamily(
    name="gpt_oss",
    summary="GPT-OSS: 4 of 32 or 128 experts, all with biases, clamped SwiGLU, sinks, windows on every other layer",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "gpt_oss", config_from_hf, config_to_hf, key_rules),
)
