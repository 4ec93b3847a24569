"""DeepSeek-V3.2: DeepSeek-V3 with sparse attention.

Different from DeepSeek-V3: in every layer an indexer (models/blocks/indexer.py) chooses the 2048 keys that a query
attends to. It adds 14 million parameters a layer, and turns the two halves of a head's first channels, there as here,
while checkpoints turn neighbouring channels of the attention it serves.

DeepSeek trained it on top of a trained V3.1, in two stages: 1000 steps of `index_loss = "dense"` with all else frozen,
at lr 1e-3, then 15000 of "sparse" with all of it, at lr 7.3e-6 (from public copies of the report, unverified).
transformers computes the same, but cannot train the indexer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.indexer import IndexerConfig
from nanovl.models.blocks.mla import MlaConfig
from nanovl.models.decoder import Decoder, DecoderConfig, adamw_groups
from nanovl.models.deepseek_v3 import (
    DERIVED,
    INIT,
    LATENT,
    first_dense_from_hf,
    first_dense_to_hf,
    latent,
    main_rules,
    released,
    small,
    small_experts,
    small_latent,
    yarn,
)
from nanovl.models.hf_config import layer_types, rope_from_hf
from nanovl.models.hf_keys import MTP_BEHIND, with_mtp_rules
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily

ARCHITECTURE = "DeepseekV32ForCausalLM"
INDEX = ("index_n_heads", "index_head_dim", "index_topk")
"""Sizes of the indexer, there and here."""
INDEXER = {
    "wq_b.weight": "q_proj.weight",
    "wk.weight": "k_proj.weight",
    "k_norm.weight": "k_layer_norm.weight",
    "k_norm.bias": "k_layer_norm.bias",
    "weights_proj.weight": "weights_proj.weight",
}


def indexed(mixer: MlaConfig, heads: int, head_dim: int, topk: int) -> MlaConfig:
    """Latent attention to the keys that an indexer chooses."""
    indexer = IndexerConfig(index_n_heads=heads, index_head_dim=head_dim, index_topk=topk)
    return replace(mixer, indexer=indexer)


FLAVORS = {
    "671b-a37b": lambda: released(indexed(latent(128, yarn(40.0, 4096)), 64, 128, 2048)),
    "debug": lambda: small(indexed(small_latent(yarn(4.0, 32)), 16, 16, 16), small_experts()),
}


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    layers, dense = hf["num_hidden_layers"], hf["first_k_dense_replace"]
    hf.expect(mlp_bias=False, rope_interleave=True)
    hf.ignore(*DERIVED, "mlp_layer_types")
    layer_types(hf, period=1, kinds={"indexed_attention": "moe"})
    if hf.sound("num_hidden_layers") and hf.sound("first_k_dense_replace"):
        hf.expect(mlp_layer_types=["dense"] * min(dense, layers) + ["sparse"] * (layers - dense))
    indexer = IndexerConfig(**{key: hf[key] for key in INDEX})
    sizes = {key: hf[key] for key in LATENT}
    mixer = MlaConfig(**sizes, rope=rope_from_hf(hf), bias=hf.get("attention_bias", False), indexer=indexer)
    return first_dense_from_hf(hf, mixer, INIT)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where DeepseekV32ForCausalLM cannot say the same."""
    mixer = config.blocks["moe"].mixer if "moe" in config.blocks else None
    if not isinstance(mixer, MlaConfig) or mixer.indexer is None:
        raise ConfigError(
            f"model.blocks.moe.mixer: wants kind = 'mla' with an indexer, as {ARCHITECTURE} has"
        )
    sizes = {key: getattr(mixer, key) for key in LATENT}
    index = {key: getattr(mixer.indexer, key) for key in INDEX}
    plain = MlaConfig(**sizes, rope=mixer.rope, bias=mixer.bias, indexer=IndexerConfig(**index))
    said = first_dense_to_hf(config, plain, ARCHITECTURE, "deepseek_v32")
    return {**said, **sizes, **index, "attention_bias": mixer.bias}


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map."""
    theirs, ours = "model.layers.{i}.self_attn.indexer", "layers.{i}.mixer.indexer"
    indexer = [KeyRule(f"{theirs}.{a}", f"{ours}.{b}") for a, b in INDEXER.items()]
    return with_mtp_rules(config, [*main_rules(config), *indexer])


FAMILY = ModelFamily(
    name="deepseek_v32",
    summary="DeepSeek-V3.2: DeepSeek-V3 whose queries attend to 2048 keys that an indexer chooses",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "deepseek_v32", config_from_hf, config_to_hf, key_rules, mtp=MTP_BEHIND),
)
