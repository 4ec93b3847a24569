"""Qwen3.5, dense sizes, the text decoder.

Different from Qwen3-Next: an ordinary SwiGLU MLP in every layer, and projections of Gated DeltaNet that checkpoints
keep apart. Its rotation has three positions for each token, in sections of the channels (mrope); a text has the same
number in all three, so for text alone that is the plain rotation, which is what is computed here. `mrope_section` of a
config.json is therefore neither needed nor kept.

Unverified, for want of the released files: the sizes of the 27B are those of OLMo-core's and slime's configs, the
rotation's base among them; the context is from memory. `mtp.*` is as in Qwen3-Next, by vLLM's qwen3_5_mtp.py. Released
files also hold a vision tower, and are refused for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.decoder import Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_keys import MLP, decoder_rules
from nanovl.models.qwen3_next import (
    hybrid,
    hybrid_from_hf,
    hybrid_rules,
    hybrid_to_hf,
    linear_heads,
    module_apart,
    parts,
    rows,
)
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily, MtpFiles

ARCHITECTURE = "Qwen3_5ForCausalLM"
VOCAB = 248320
MTP = MtpFiles("mtp_num_hidden_layers", module_apart)
"""The key is that of public copies of released files."""

FLAVORS = {
    # unverified
    "27b": lambda: hybrid(
        MlpConfig(intermediate_size=17408),
        linear_heads(16, 48, 128),
        layers=64,
        hidden=5120,
        heads=24,
        kv_heads=4,
        vocab=VOCAB,
    ),
    "debug": lambda: hybrid(
        MlpConfig(intermediate_size=128),
        linear_heads(2, 6, 16),
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
    hf.expect(hidden_act="silu")
    return hybrid_from_hf(hf, MlpConfig(intermediate_size=hf["intermediate_size"]), MTP.depth)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Qwen3_5ForCausalLM cannot say the same."""
    ffn = parts(config, ARCHITECTURE)[2]
    if ffn != MlpConfig(intermediate_size=getattr(ffn, "intermediate_size", 0)):
        raise ConfigError(f"model.blocks.full.ffn: {ARCHITECTURE} has a SwiGLU MLP without biases there")
    said = hybrid_to_hf(config, ARCHITECTURE, "qwen3_5_text", MTP.depth)
    return {**said, "intermediate_size": ffn.intermediate_size}


def rules_apart(config: DecoderConfig, every: Sequence[KeyRule | KeyGroup]) -> list[KeyRule | KeyGroup]:
    """The key map of Qwen3.5, with experts or without: `every` is that of all layers, but for their mixers."""
    linear = parts(config, ARCHITECTURE)[0]
    keys, values = linear.num_key_heads * linear.key_head_dim, linear.num_value_heads * linear.value_head_dim
    qkv = [f"{name}_proj.weight" for name in "qkv"]
    projections = [
        rows(f"linear_attn.in_proj_{name}.weight", [f"{name}_proj.weight"], 1, [size])
        for name, size in (("z", values), ("a", linear.num_value_heads), ("b", linear.num_value_heads))
    ]
    together = rows("linear_attn.in_proj_qkv.weight", qkv, 1, (keys, keys, values))
    return hybrid_rules(config, every, [*projections, together])


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map."""
    return rules_apart(config, decoder_rules(config, MLP))


FAMILY = ModelFamily(
    name="qwen3_5",
    summary="Qwen3.5 dense, text: gated DeltaNet on three of four layers, gated attention, SwiGLU",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "qwen3_5_text", config_from_hf, config_to_hf, key_rules, mtp=MTP),
)
