"""nanochat as first released: from 13 October 2025 (commit cf587ac is of 1 November) to 10 January 2026.

Different from Llama: norms without weights, one more right after the embedding; queries and keys normed after the
rotation; squared-ReLU MLP without a gate; logits softly capped at 15; every block starts as the identity. Size is
one number, the depth: hidden = 64 x depth, heads = hidden / 128. The published checkpoints d20 to d34 are of this era;
what came after is the family `nanochat`.

Trap: nanochat's norms add float32's epsilon, 1.19e-7, and so do the sizes here. transformers' class adds 1e-6 unless
its config.json has another `rms_norm_eps`: it is read from there, and written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from nanovl.config.config_json import ConfigJson
from nanovl.config.schema import OptimizerGroup
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.init import InitConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig
from nanovl.models.hf_config import (
    dense,
    rope_from_hf,
    rope_to_hf,
    same_or_refuse,
    sizes_from_hf,
    sizes_of,
    sizes_to_hf,
)
from nanovl.models.hf_keys import ATTENTION, decoder_rules
from nanovl.models.nanochat_config import EPS
from nanovl.models.nanochat_files import PADDED, block_rules, halves_swapped, stated_cap
from nanovl.models.nanochat_files import sizes_of as sizes_of_meta
from nanovl.spec import HuggingFaceSpec, KeyRule, ModelFamily, NanochatSpec

ARCHITECTURE = "NanoChatForCausalLM"
ROPE = RopeConfig(theta=10_000.0)


def nanochat_v1(
    *,
    layers: int,
    hidden: int,
    heads: int,
    ffn: int = 0,
    kv_heads: int = 0,
    head_dim: int = 0,
    vocab: int = 65536,
    rope: RopeConfig | None = ROPE,
    eps: float = EPS,
    context: int = 2048,
    tie: bool = False,
    bias: bool = False,
    softcap: float | None = 15.0,
) -> DecoderConfig:
    """A first nanochat of any size; 0 = as nanochat has it."""
    mixer = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        rope=rope,
        qk_norm="head",
        qk_norm_after_rope=True,
        qk_norm_weight=False,
        qkv_bias=bias,
        o_bias=bias,
    )
    ffn_config = MlpConfig(intermediate_size=ffn or 4 * hidden, activation="relu2", gated=False)
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"full": BlockConfig(mixer=mixer, ffn=ffn_config)},
        pattern=["full"],
        norm=NormConfig(eps=eps, weight="none"),
        tie_word_embeddings=tie,
        embed_norm=True,
        final_logit_softcapping=softcap,
        max_position_embeddings=context,
        init=InitConfig(outputs="zero"),
    )


def released(depth: int) -> DecoderConfig:
    """The model of `depth` layers. Depths whose width does not split into whole heads are not a size of this family."""
    hidden = 64 * depth
    return nanochat_v1(layers=depth, hidden=hidden, heads=max(1, -(-hidden // 128)))


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="relu2")
    return nanochat_v1(
        **sizes_from_hf(hf),
        rope=rope_from_hf(hf),
        bias=hf.get("attention_bias", False),
        softcap=hf.get("final_logit_softcapping", 15.0),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where NanoChatForCausalLM cannot say the same."""
    mixer, _ = dense(config, ARCHITECTURE)
    bias, softcap = mixer.qkv_bias, config.final_logit_softcapping
    plain = nanochat_v1(**sizes_of(config, ARCHITECTURE), rope=mixer.rope, bias=bias, softcap=softcap)
    same_or_refuse(config, plain, ARCHITECTURE)
    return {
        **sizes_to_hf(config, ARCHITECTURE, "nanochat"),
        **rope_to_hf(mixer.rope),
        "hidden_act": "relu2",
        "attention_bias": bias,
        "final_logit_softcapping": softcap,
    }


def hf_rules(config: DecoderConfig) -> list[KeyRule]:
    """The key map of NanoChatForCausalLM, which rotates as nanochat does."""
    swap = halves_swapped(dense(config, ARCHITECTURE)[0].head_dim)
    mlp = {"mlp.fc1.weight": "ffn.up_proj.weight", "mlp.fc2.weight": "ffn.down_proj.weight"}
    rules = decoder_rules(config, {**ATTENTION, **mlp})
    turned = (".q_proj.weight", ".q_proj.bias", ".k_proj.weight", ".k_proj.bias")
    return [
        KeyRule(rule.theirs, rule.ours, swap, swap) if rule.ours.endswith(turned) else rule for rule in rules
    ]


def config_from_meta(meta: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> DecoderConfig | None:
    """The config of tensors of the first release; None for those of later eras. Raises ConfigError."""
    if "resid_lambdas" in shapes:
        return None
    sizes = sizes_of_meta(meta)
    if "S" in str(meta["model_config"].get("window_pattern", "L")).upper():
        raise ConfigError(
            "model_config.window_pattern: has short windows, and nanochat had none before resid_lambdas"
        )
    return nanochat_v1(
        layers=sizes["n_layer"],
        hidden=sizes["n_embd"],
        heads=sizes["n_head"],
        kv_heads=sizes["n_kv_head"],
        vocab=sizes["vocab_size"],
        context=sizes["sequence_len"],
        softcap=stated_cap(meta) or 15.0,
    )


def config_to_meta(config: DecoderConfig) -> dict[str, Any]:
    """The `model_config` of `config`. Raises ConfigError where nanochat's own code would compute something else."""
    sizes = sizes_of(config, "nanochat")
    sizes = {key: sizes[key] for key in ("layers", "hidden", "heads", "kv_heads", "vocab", "context")}
    same_or_refuse(config, nanochat_v1(**sizes), "nanochat's own code")
    return {
        "sequence_len": sizes["context"],
        "vocab_size": sizes["vocab"],
        "n_layer": sizes["layers"],
        "n_head": sizes["heads"],
        "n_kv_head": sizes["kv_heads"],
        "n_embd": sizes["hidden"],
    }


def key_rules(config: DecoderConfig) -> list[KeyRule]:
    """The key map of nanochat's own checkpoints. Rows that only pad the vocabulary are left out: nothing reads them."""
    vocab = config.vocab_size

    def unpadded(table: Tensor) -> Tensor:
        return table[:vocab] if len(table) == -(-vocab // PADDED) * PADDED else table

    return [
        KeyRule("transformer.wte.weight", "embed_tokens.weight", unpadded),
        KeyRule("lm_head.weight", "lm_head.weight", unpadded),
        *block_rules(dense(config, ARCHITECTURE)[0].head_dim),
    ]


def optimizer_groups(config: DecoderConfig) -> list[OptimizerGroup]:
    """Muon for the matrices of blocks, AdamW for head and embedding, nothing decays."""
    adamw = partial(OptimizerGroup, beta1=0.8, beta2=0.95, weight_decay=0.0, scale_with_width=True)
    return [
        adamw(match=r"lm_head\.weight", lr=0.004),
        adamw(match=r"embed_tokens\.weight", lr=0.2),
        OptimizerGroup(match=r"(layers|mtp)\..*_proj\.weight", kind="muon", lr=0.02, weight_decay=0.0),
    ]


FLAVORS = {
    **{f"d{depth}": partial(released, depth) for depth in (20, 26, 30, 32, 34)},
    "debug": partial(nanochat_v1, layers=4, hidden=64, heads=4, vocab=512, context=128),
}

FAMILY = ModelFamily(
    name="nanochat_v1",
    summary="nanochat, October 2025: weightless norms, normed q and k after the rotation, squared ReLU, soft cap",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=optimizer_groups,
    hf=HuggingFaceSpec(ARCHITECTURE, "nanochat", config_from_hf, config_to_hf, hf_rules),
    nanochat=NanochatSpec(config_from_meta, key_rules, config_to_meta),
)
