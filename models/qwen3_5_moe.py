"""Qwen3.5 with experts, the text decoder: the layers of Qwen3.5, the MLPs of Qwen3-Next, 8 of 256 experts a token.

Unverified, for want of the released files: how experts lie there. transformers writes one tensor an expert, reads also
[experts, 2 x inner, model], and both are read here; torchtitan's adapter expects [experts, model, 2 x inner] instead,
which is refused here by its shape. The sizes of the 35B are the defaults of transformers' class; the rotation's base
and the context are as in Qwen3.5.
"""

from __future__ import annotations

from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.decoder import Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_keys import decoder_rules, expert_rules
from nanovl.models.qwen3_5 import MTP, VOCAB, rules_apart
from nanovl.models.qwen3_next import (
    EXPERTS,
    experts,
    experts_from_hf,
    experts_to_hf,
    hybrid,
    hybrid_from_hf,
    hybrid_to_hf,
    linear_heads,
    parts,
)
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily

ARCHITECTURE = "Qwen3_5MoeForCausalLM"

FLAVORS = {
    # unverified
    "35b-a3b": lambda: hybrid(
        experts(256, 8, 512),
        linear_heads(16, 32, 128),
        layers=40,
        hidden=2048,
        heads=16,
        kv_heads=2,
        vocab=VOCAB,
    ),
    "debug": lambda: hybrid(
        experts(8, 2, 32),
        linear_heads(2, 4, 16),
        layers=4,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab=512,
        context=128,
    ),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu", norm_topk_prob=True)
    hf.ignore("intermediate_size")  # there are no layers without experts
    return hybrid_from_hf(hf, experts_from_hf(hf), MTP.depth)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Qwen3_5MoeForCausalLM cannot say the same."""
    said = experts_to_hf(config, ARCHITECTURE)
    if not said.pop("norm_topk_prob"):
        raise ConfigError(f"model.blocks.full.ffn.norm_topk_prob = False: {ARCHITECTURE} has True there")
    return {**hybrid_to_hf(config, ARCHITECTURE, "qwen3_5_moe_text", MTP.depth), **said}


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map."""
    ffn = parts(config, ARCHITECTURE)[2]
    assert isinstance(ffn, MoeConfig)
    return rules_apart(config, [*decoder_rules(config, EXPERTS), *expert_rules(ffn.num_experts)])


FAMILY = ModelFamily(
    name="qwen3_5_moe",
    summary="Qwen3.5 with experts, text: gated DeltaNet on three of four layers, 8 of 256 experts and a shared one",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "qwen3_5_moe_text", config_from_hf, config_to_hf, key_rules, mtp=MTP),
)
