"""GLM-4.5 (arXiv:2508.06471): the experts of DeepSeek-V3 without groups, behind grouped-query attention.

Different from Llama: half of a head's channels turn; queries, keys and values have biases, and in the largest size
queries and keys are normed; behind a few dense layers every MLP is experts, as DeepSeek-V3's. A layer behind the last
is multi-token prediction, as there.

transformers' class defaults are no released model: those have biases and base 1e6, as public copies of their files say.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.init import InitConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import Decoder, DecoderConfig, adamw_groups
from nanovl.models.deepseek_v3 import (
    experts,
    first_dense,
    first_dense_from_hf,
    first_dense_to_hf,
    parts,
    small,
)
from nanovl.models.hf_config import heads_of, rope_from_hf
from nanovl.models.hf_keys import (
    ATTENTION,
    MLP,
    MTP_BEHIND,
    ROUTED,
    decoder_rules,
    expert_rules,
    with_mtp_rules,
)
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily

ARCHITECTURE = "Glm4MoeForCausalLM"
HALF = 0.5
"""Share of a head's channels that turn."""
INIT = InitConfig()
ROPE = RopeConfig(theta=1e6, partial_rotary_factor=HALF)


def attention(
    heads: int,
    kv_heads: int = 8,
    head_dim: int = 128,
    *,
    rope: RopeConfig | None = ROPE,
    normed: bool = False,
    bias: bool = True,
) -> AttentionConfig:
    """GLM-4.5's attention of any size."""
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        qk_norm="head" if normed else "none",
        qkv_bias=bias,
    )


# GLM-4.5 of any size
glm = partial(first_dense, eps=1e-5, vocab=151552, context=131072, init=INIT)
FLAVORS = {
    # GLM-4.5-Air
    "106b-a12b": lambda: glm(
        attention(96), experts(128, 8, 1408), layers=46, dense_layers=1, hidden=4096, ffn=10944
    ),
    "355b-a32b": lambda: glm(
        attention(96, normed=True),
        experts(160, 8, 1536, scale=2.5),
        layers=92,
        dense_layers=3,
        hidden=5120,
        ffn=12288,
    ),
    "debug": lambda: small(
        attention(8, 4, 16, normed=True), experts(8, 2, 32, scale=2.5), eps=1e-5, init=INIT
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    mixer = attention(
        hf["num_attention_heads"],
        hf["num_key_value_heads"],
        hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope=rope_from_hf(hf, partial=HALF),
        normed=hf.get("use_qk_norm", False),
        bias=hf.get("attention_bias", False),
    )
    return first_dense_from_hf(hf, mixer, INIT)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Glm4MoeForCausalLM cannot say the same."""
    mixer = config.blocks["moe"].mixer if "moe" in config.blocks else None
    if not isinstance(mixer, AttentionConfig):
        raise ConfigError(f"model.blocks.moe.mixer: wants kind = 'attention', as {ARCHITECTURE} has")
    normed = mixer.qk_norm == "head"
    plain = attention(**heads_of(mixer), rope=mixer.rope, normed=normed, bias=mixer.qkv_bias)
    return {
        **first_dense_to_hf(config, plain, ARCHITECTURE, "glm4_moe"),
        "partial_rotary_factor": 1.0 if mixer.rope is None else mixer.rope.partial_rotary_factor,
        "use_qk_norm": normed,
        "attention_bias": mixer.qkv_bias,
    }


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map."""
    moe = parts(config, ARCHITECTURE)[1]
    rules: list[KeyRule | KeyGroup] = [
        *decoder_rules(config, {**ATTENTION, **MLP, **ROUTED}),
        *expert_rules(moe.num_experts),
    ]
    return with_mtp_rules(config, rules)


FAMILY = ModelFamily(
    name="glm4_moe",
    summary="GLM-4.5: grouped-query attention, half of each head rotated, experts as in DeepSeek-V3 without groups",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "glm4_moe", config_from_hf, config_to_hf, key_rules, mtp=MTP_BEHIND),
)
