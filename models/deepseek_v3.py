"""DeepSeek-V3 (arXiv:2412.19437), also R1; and Moonlight, which has no latent of queries and no groups.

Different from Llama: keys and values come from one latent a token (models/blocks/mla.py), YaRN also sharpens the
softmax; behind a few dense layers every MLP is experts, chosen by sigmoid scores and a bias that evens their loads out
instead of a loss, from the best groups, beside a shared one; weights begin with deviation 0.006.

Checkpoints turn neighbouring channels; rows are permuted when they are read. `e_score_correction_bias`, a buffer, is
our router's `expert_bias`: it goes on moving by `bias_update_speed` in training, 0 freezes it. A layer behind the last
is multi-token prediction (models/blocks/mtp.py), computed as transformers does; flavors are without it.

Unverified, for want of the released files: Moonlight's eps (1e-6 is the class's; public copies differ).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.init import InitConfig
from nanovl.models.blocks.mla import MlaConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig, RopeScaling
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_config import (
    MTP_LAYERS,
    body_from_hf,
    body_of,
    decoder_to_hf,
    mtp_of,
    rope_from_hf,
    rope_to_hf,
    same_or_refuse,
)
from nanovl.models.hf_keys import (
    MLP,
    MTP_BEHIND,
    ROUTED,
    decoder_rules,
    expert_rules,
    latent_rules,
    with_mtp_rules,
)
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily

ARCHITECTURE = "DeepseekV3ForCausalLM"
INIT = InitConfig(std=0.006)
LATENT = (
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
"""Sizes of latent attention, there and here."""
DERIVED = ("num_key_value_heads", "head_dim", "qk_head_dim")
"""What a config.json may say too, and transformers works out from those."""


def first_dense(
    mixer: AttentionConfig | MlaConfig,
    moe: MoeConfig,
    *,
    layers: int,
    dense_layers: int,
    hidden: int,
    ffn: int,
    vocab: int,
    eps: float = 1e-6,
    context: int,
    tie: bool = False,
    init: InitConfig = INIT,
) -> DecoderConfig:
    """A decoder whose first `dense_layers` have an MLP of width `ffn`, and the others experts."""
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={
            "dense": BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=ffn)),
            "moe": BlockConfig(mixer=replace(mixer), ffn=moe),
        },
        prefix=["dense"] * dense_layers,
        pattern=["moe"],
        norm=NormConfig(eps=eps, cast_before_scale=True),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
        init=replace(init),
    )


def experts(
    count: int,
    active: int,
    width: int,
    *,
    shared: int = 1,
    groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
    normed: bool = True,
) -> MoeConfig:
    """Experts of `width`, and one `shared` times as wide that every token goes through."""
    return MoeConfig(
        num_experts=count,
        num_experts_per_tok=active,
        moe_intermediate_size=width,
        scoring="sigmoid",
        norm_topk_prob=normed,
        routed_scaling_factor=scale,
        n_group=groups,
        topk_group=topk_groups,
        shared_expert_intermediate_size=shared * width,
        load_balancing="bias",
    )


def latent(heads: int, rope: RopeConfig, *, q_rank: int | None = 1536) -> MlaConfig:
    """Latent attention of the released sizes."""
    return MlaConfig(
        num_attention_heads=heads,
        q_lora_rank=q_rank,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope=rope,
    )


def small_latent(rope: RopeConfig) -> MlaConfig:
    """The same, small."""
    return MlaConfig(
        num_attention_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        rope=rope,
    )


def small_experts() -> MoeConfig:
    """Few of them, in groups."""
    return experts(8, 2, 32, groups=4, topk_groups=2, scale=2.5)


def yarn(factor: float, original: int, *, theta: float = 1e4, beta_fast: float = 32.0) -> RopeConfig:
    """YaRN whose sharpening is all in the softmax's scale."""
    scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=beta_fast,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    return RopeConfig(theta=theta, scaling=scaling)


def released(mixer: MlaConfig) -> DecoderConfig:
    """DeepSeek-V3 around such attention."""
    return first_dense(
        mixer,
        experts(256, 8, 2048, groups=8, topk_groups=4, scale=2.5),
        layers=61,
        dense_layers=3,
        hidden=7168,
        ffn=18432,
        vocab=129280,
        context=163840,
    )


small = partial(first_dense, layers=4, dense_layers=1, hidden=64, ffn=128, vocab=512, context=128)
"""Mixer, experts -> the same, small."""

FLAVORS = {
    "671b-a37b": lambda: released(latent(128, yarn(40.0, 4096))),
    # Moonlight
    "16b-a3b": lambda: first_dense(
        latent(16, RopeConfig(theta=5e4), q_rank=None),
        experts(64, 6, 1408, shared=2, scale=2.446),
        layers=27,
        dense_layers=1,
        hidden=2048,
        ffn=11264,
        vocab=163840,
        context=8192,
    ),
    "debug": lambda: small(small_latent(yarn(4.0, 32)), small_experts()),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(rope_interleave=True)
    sizes = {key: hf[key] for key in LATENT}
    mixer = MlaConfig(**sizes, rope=rope_from_hf(hf), bias=hf.get("attention_bias", False))
    hf.ignore(*DERIVED)
    return first_dense_from_hf(hf, mixer, INIT)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where DeepseekV3ForCausalLM cannot say the same."""
    mixer = config.blocks["moe"].mixer if "moe" in config.blocks else None
    if not isinstance(mixer, MlaConfig):
        raise ConfigError(f"model.blocks.moe.mixer: wants kind = 'mla', as {ARCHITECTURE} has")
    sizes = {key: getattr(mixer, key) for key in LATENT}
    plain = MlaConfig(**sizes, rope=mixer.rope, bias=mixer.bias)
    return {
        **first_dense_to_hf(config, plain, ARCHITECTURE, "deepseek_v3"),
        **sizes,
        "attention_bias": mixer.bias,
    }


def first_dense_from_hf(
    hf: ConfigJson, mixer: AttentionConfig | MlaConfig, init: InitConfig
) -> DecoderConfig:
    """The config of a config.json of these families, but for its mixer."""
    hf.expect(hidden_act="silu", moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc")
    moe = experts(
        hf["n_routed_experts"],
        hf["num_experts_per_tok"],
        hf["moe_intermediate_size"],
        shared=hf["n_shared_experts"],
        groups=hf["n_group"],
        topk_groups=hf["topk_group"],
        scale=hf["routed_scaling_factor"],
        normed=hf["norm_topk_prob"],
    )
    config = first_dense(
        mixer,
        moe,
        dense_layers=min(hf["first_k_dense_replace"], hf["num_hidden_layers"]),
        ffn=hf["intermediate_size"],
        init=init,
        **body_from_hf(hf),
    )
    config.mtp = mtp_of(config, hf.get(MTP_LAYERS) or 0, "moe")
    return config


def first_dense_to_hf(
    config: DecoderConfig, mixer: AttentionConfig | MlaConfig, architecture: str, model_type: str
) -> dict[str, Any]:
    """The config.json of `config`, but for its mixer. Raises ConfigError where it cannot say the same."""
    ffn, moe = parts(config, architecture)
    names = config.layer_names()
    dense_layers = names.count("dense")
    if names != ["dense"] * dense_layers + ["moe"] * (len(names) - dense_layers):
        raise ConfigError(f"model.pattern: {architecture} has its dense layers first")
    shared = moe.shared_expert_intermediate_size // moe.moe_intermediate_size
    plain = first_dense(
        mixer,
        experts(
            moe.num_experts,
            moe.num_experts_per_tok,
            moe.moe_intermediate_size,
            shared=max(shared, 1),
            groups=moe.n_group,
            topk_groups=moe.topk_group,
            scale=moe.routed_scaling_factor,
            normed=moe.norm_topk_prob,
        ),
        dense_layers=dense_layers,
        ffn=ffn.intermediate_size,
        **body_of(config),
    )
    depths = config.mtp.num_layers if config.mtp else 0
    plain.mtp = mtp_of(config, depths, "moe")
    same_or_refuse(config, plain, architecture)
    return {
        **decoder_to_hf(config, mixer, architecture, model_type),
        **rope_to_hf(mixer.rope),
        "hidden_act": "silu",
        "intermediate_size": ffn.intermediate_size,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "first_k_dense_replace": dense_layers,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": shared,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "norm_topk_prob": moe.norm_topk_prob,
        MTP_LAYERS: depths,
    }


def parts(config: DecoderConfig, architecture: str) -> tuple[MlpConfig, MoeConfig]:
    """The MLPs of the two templates. Raises ConfigError where there are others."""
    dense, moe = (config.blocks[name].ffn if name in config.blocks else None for name in ("dense", "moe"))
    if not isinstance(dense, MlpConfig) or not isinstance(moe, MoeConfig):
        raise ConfigError(
            f"model.blocks: wants `dense`, with an mlp, and `moe`, with a moe, as {architecture} has"
        )
    return dense, moe


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map."""
    return with_mtp_rules(config, main_rules(config))


def main_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map without multi-token prediction."""
    mixer = config.blocks["moe"].mixer
    assert isinstance(mixer, MlaConfig)
    moe = parts(config, ARCHITECTURE)[1]
    return [
        *decoder_rules(config, {**MLP, **ROUTED}),
        *latent_rules(mixer),
        *expert_rules(moe.num_experts),
    ]


FAMILY = ModelFamily(
    name="deepseek_v3",
    summary="DeepSeek-V3: latent attention, 8 of 256 experts by sigmoid and groups, balanced by a bias, a shared one",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "deepseek_v3", config_from_hf, config_to_hf, key_rules, mtp=MTP_BEHIND),
)
