"""Qwen3-Next: gated DeltaNet on three of four layers, and experts on all.

Different from Qwen3 with experts: three of four layers mix tokens by Gated DeltaNet, the fourth by attention whose
output is gated, and of whose 256 channels a head a quarter turn; norms keep their scales less one; 10 of 512 experts a
token beside a shared one, which is gated too. Qwen3.5 is built of the same layers.

Checkpoints group the rows of several projections by key head; they are sorted when read. `mtp.*` is one module of
multi-token prediction (models/blocks/mtp.py) around a layer of attention and experts; flavors are without it.

Unverified, for want of the released files: the rotation's base and the context, from memory. The other sizes are the
defaults of transformers' class, and come to the published 80B. transformers has no such module: its names, the order in
which `mtp.fc` reads embedding and state, and that the state comes from behind the last norm, are those of vLLM's
qwen3_next_mtp.py and SGLang's. Both count one module where config.json is silent; further ones would share `mtp.fc` and
the norms, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.gated_delta_net import GatedDeltaNetConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_config import (
    MTP_LAYERS,
    body_from_hf,
    body_of,
    decoder_to_hf,
    heads_of,
    layer_types,
    mtp_of,
    rope_from_hf,
    rope_to_hf,
    same_or_refuse,
    tiling,
)
from nanovl.models.hf_keys import decoder_rules, expert_rules, in_layers, moved
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily, MtpFiles, computed

ARCHITECTURE = "Qwen3NextForCausalLM"
ATTENTION = ("k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
"""What checkpoints have as it is here."""
PATTERN = ("linear", "linear", "linear", "full")
LAYER_TYPES = {"linear_attention": "linear", "full_attention": "full"}
QUARTER = 0.25
"""Share of a head's channels that turn."""
ROPE = RopeConfig(theta=1e7, partial_rotary_factor=QUARTER)  # base unverified
CONTEXT = 262144  # unverified


def hybrid(
    ffn: MlpConfig | MoeConfig,
    linear: GatedDeltaNetConfig,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int = 256,
    vocab: int,
    rope: RopeConfig | None = ROPE,
    eps: float = 1e-6,
    context: int = CONTEXT,
    tie: bool = False,
    bias: bool = False,
) -> DecoderConfig:
    """A Qwen3-Next or Qwen3.5 of any size, with `ffn` in every layer."""
    full = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        output_gate=True,
    )
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={
            "linear": BlockConfig(mixer=linear, ffn=ffn),
            "full": BlockConfig(mixer=full, ffn=replace(ffn)),
        },
        pattern=list(PATTERN),
        norm=NormConfig(eps=eps, weight="zeros"),
        tie_word_embeddings=tie,
        max_position_embeddings=context,
    )


def linear_heads(keys: int, values: int, dim: int) -> GatedDeltaNetConfig:
    """Heads of `dim` channels."""
    return GatedDeltaNetConfig(
        num_key_heads=keys, num_value_heads=values, key_head_dim=dim, value_head_dim=dim
    )


def experts(count: int, active: int, width: int) -> MoeConfig:
    """Experts and a shared one, all of `width`."""
    return MoeConfig(
        num_experts=count,
        num_experts_per_tok=active,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
        shared_expert_gate=True,
    )


FLAVORS = {
    "80b-a3b": lambda: hybrid(
        experts(512, 10, 512),
        linear_heads(16, 32, 128),
        layers=48,
        hidden=2048,
        heads=16,
        kv_heads=2,
        vocab=151936,
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


def hybrid_from_hf(
    hf: ConfigJson, ffn: MlpConfig | MoeConfig, depth: str, *, theta: float = 10_000.0
) -> DecoderConfig:
    """The config of a config.json of these families, whose key of the modules' number is `depth`; `theta` where it is
    silent."""
    if (depths := hf.get(depth, 0)) > 1:
        hf.refuse(
            depth,
            "modules of these checkpoints share one `mtp.fc` and its norms, which is not computed here beyond one "
            "module",
        )
    hf.expect(attn_output_gate=True, output_gate_type="swish")  # as released files of Qwen3.5 say
    period = hf.get("full_attention_interval", len(PATTERN))
    names = layer_types(hf, period=period, kinds=LAYER_TYPES)
    linear = GatedDeltaNetConfig(
        num_key_heads=hf["linear_num_key_heads"],
        num_value_heads=hf["linear_num_value_heads"],
        key_head_dim=hf["linear_key_head_dim"],
        value_head_dim=hf["linear_value_head_dim"],
        conv_kernel_size=hf["linear_conv_kernel_dim"],
    )
    config = hybrid(
        ffn,
        linear,
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        rope=rope_from_hf(hf, theta=theta, partial=QUARTER),
        bias=hf.get("attention_bias", False),
        **body_from_hf(hf),
    )
    config.pattern = tiling(names, PATTERN)
    config.mtp = mtp_of(config, depths, "full")
    return config


def hybrid_to_hf(config: DecoderConfig, architecture: str, model_type: str, depth: str) -> dict[str, Any]:
    """The config.json of `config`, but for its MLPs. Raises ConfigError where it cannot say the same."""
    linear, full, ffn = parts(config, architecture)
    plain = hybrid(ffn, linear, rope=full.rope, bias=full.qkv_bias, **heads_of(full), **body_of(config))
    plain.mtp = mtp_of(config, 1 if config.mtp else 0, "full")
    same_or_refuse(config, plain, architecture)
    return {
        **decoder_to_hf(config, full, architecture, model_type),
        depth: 1 if config.mtp else 0,
        **rope_to_hf(full.rope),
        "partial_rotary_factor": 1.0 if full.rope is None else full.rope.partial_rotary_factor,
        "hidden_act": "silu",
        "attention_bias": full.qkv_bias,
        "layer_types": [f"{name}_attention" for name in config.layer_names()],
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_conv_kernel_dim": linear.conv_kernel_size,
    }


def parts(
    config: DecoderConfig, architecture: str
) -> tuple[GatedDeltaNetConfig, AttentionConfig, MlpConfig | MoeConfig]:
    """The two mixers and the MLP. Raises ConfigError where the layers are other ones."""
    blocks = config.blocks
    names = list(LAYER_TYPES.values())
    linear, full = (blocks[name].mixer if name in blocks else None for name in names)
    known = blocks.keys() == set(names)
    if not known or not isinstance(linear, GatedDeltaNetConfig) or not isinstance(full, AttentionConfig):
        raise ConfigError(
            f"model.blocks: wants `linear`, of gated_delta_net, and `full`, of attention, as {architecture} has"
        )
    return linear, full, blocks["full"].ffn


def experts_from_hf(hf: ConfigJson) -> MoeConfig:
    """The experts of a config.json."""
    return MoeConfig(
        num_experts=hf["num_experts"],
        num_experts_per_tok=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["moe_intermediate_size"],
        norm_topk_prob=hf.get("norm_topk_prob", True),
        shared_expert_intermediate_size=hf["shared_expert_intermediate_size"],
        shared_expert_gate=True,
    )


def experts_to_hf(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """Keys of config.json for the experts. Raises ConfigError for other ones than these families have."""
    ffn = parts(config, architecture)[2]
    if not isinstance(ffn, MoeConfig):
        raise ConfigError(f"model.blocks.full.ffn.kind = {ffn.kind!r}: {architecture} has 'moe' there")
    said = {
        "num_experts": ffn.num_experts,
        "num_experts_per_tok": ffn.num_experts_per_tok,
        "moe_intermediate_size": ffn.moe_intermediate_size,
        "norm_topk_prob": ffn.norm_topk_prob,
        "shared_expert_intermediate_size": ffn.shared_expert_intermediate_size,
    }
    plain = computed(experts_from_hf(ConfigJson(said, architecture)))
    wrong = [
        f"model.blocks.full.ffn.{key} = {value!r}: cannot be written; {architecture} has {plain[key]!r} there"
        for key, value in computed(ffn).items()
        if value != plain[key]
    ]
    if wrong:
        raise ConfigError(wrong)
    return said


EXPERTS = {
    "mlp.gate.weight": "ffn.router.weight",
    "mlp.shared_expert_gate.weight": "ffn.shared_expert_gate.weight",
    **{
        f"mlp.shared_expert.{name}.weight": f"ffn.shared_expert.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}


MTP = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "norm"}
"""What the module of multi-token prediction has besides its layer."""


def module_apart(name: str, layers: int) -> int | None:
    """The module that tensor `name` belongs to."""
    match = re.match(r"mtp\.(?:layers\.(\d+)\.)?", name)
    return int(match[1] or 0) if match else None


def hybrid_rules(
    config: DecoderConfig,
    every: Sequence[KeyRule | KeyGroup],
    projections: Sequence[KeyRule | KeyGroup],
) -> list[KeyRule | KeyGroup]:
    """The key map, of `every` layer's rules but for the mixers; `projections` are those of Gated DeltaNet, which the
    families store differently. A module of multi-token prediction has a layer of attention."""
    linear, full, _ = parts(config, ARCHITECTURE)
    names, attention = config.layer_names(), attention_rules(full)
    ahead: list[KeyRule | KeyGroup] = []
    if config.mtp is not None:
        ours = f"mtp.{config.num_hidden_layers}."
        ahead = [KeyRule(f"mtp.{a}.weight", f"{ours}{b}.weight") for a, b in MTP.items()]
        ahead += moved([*every, *attention], "mtp.layers.0.", f"{ours}block.")
    return [
        *every,
        *in_layers(
            linear_rules(linear, projections), [i for i, name in enumerate(names) if name == "linear"]
        ),
        *in_layers(attention, [i for i, name in enumerate(names) if name == "full"]),
        *ahead,
    ]


def linear_rules(
    linear: GatedDeltaNetConfig, projections: Sequence[KeyRule | KeyGroup]
) -> list[KeyRule | KeyGroup]:
    """The key map of Gated DeltaNet."""
    keys, values = linear.num_key_heads * linear.key_head_dim, linear.num_value_heads * linear.value_head_dim
    convolution = KeyGroup(
        ("model.layers.{i}.linear_attn.conv1d.weight",),
        tuple(f"layers.{{i}}.mixer.{name}_conv" for name in "qkv"),
        lambda given: given[0].squeeze(1).split((keys, keys, values)),
        lambda ours: [torch.cat([*ours]).unsqueeze(1)],
    )
    memory = {"A_log": "A_log", "dt_bias": "dt_bias", "norm.weight": "gated_norm.weight"}
    return [
        *(_rule(f"linear_attn.{a}", b) for a, b in {**memory, "out_proj.weight": "o_proj.weight"}.items()),
        convolution,
        *projections,
    ]


def attention_rules(full: AttentionConfig) -> list[KeyRule | KeyGroup]:
    """The key map of gated attention."""
    heads, head_dims = full.num_attention_heads, (full.head_dim, full.head_dim)
    return [
        *(_rule(f"self_attn.{n}.{part}", f"{n}.{part}") for n in ATTENTION for part in ("weight", "bias")),
        *(
            rows(f"self_attn.q_proj.{part}", [f"{n}_proj.{part}" for n in "qg"], heads, head_dims)
            for part in ("weight", "bias")
        ),
    ]


def _rule(theirs: str, ours: str) -> KeyRule:
    return KeyRule(f"model.layers.{{i}}.{theirs}", f"layers.{{i}}.mixer.{ours}")


def rows(theirs: str, ours: Sequence[str], groups: int, sizes: Sequence[int]) -> KeyGroup:
    """One tensor of theirs, whose rows are `groups` times `sizes` of each of ours."""

    def split(values: Sequence[Tensor]) -> list[Tensor]:
        return [part.flatten(0, 1) for part in values[0].unflatten(0, (groups, -1)).split(list(sizes), dim=1)]

    def join(values: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([value.unflatten(0, (groups, -1)) for value in values], dim=1).flatten(0, 1)]

    names = tuple(f"layers.{{i}}.mixer.{name}" for name in ours)
    return KeyGroup((f"model.layers.{{i}}.{theirs}",), names, split, join)


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.expect(hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=[])
    hf.ignore("intermediate_size")  # there are no layers without experts
    return hybrid_from_hf(hf, experts_from_hf(hf), MTP_LAYERS)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`. Raises ConfigError where Qwen3NextForCausalLM cannot say the same."""
    said = experts_to_hf(config, ARCHITECTURE)
    common = hybrid_to_hf(config, ARCHITECTURE, "qwen3_next", MTP_LAYERS)
    return {**common, **said, "decoder_sparse_step": 1}


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map: the rows of a key head, of its value heads, and of what gates those, follow each other."""
    linear, _, ffn = parts(config, ARCHITECTURE)
    assert isinstance(ffn, MoeConfig)
    group = linear.num_value_heads // linear.num_key_heads
    value_rows = group * linear.value_head_dim
    sizes = (linear.key_head_dim, linear.key_head_dim, value_rows, value_rows)
    qkvz, ba = ([f"{name}_proj.weight" for name in names] for names in ("qkvz", "ba"))
    projections = [
        rows("linear_attn.in_proj_qkvz.weight", qkvz, linear.num_key_heads, sizes),
        rows("linear_attn.in_proj_ba.weight", ba, linear.num_key_heads, (group, group)),
    ]
    every: list[KeyRule | KeyGroup] = [*decoder_rules(config, EXPERTS), *expert_rules(ffn.num_experts)]
    return hybrid_rules(config, every, projections)


FAMILY = ModelFamily(
    name="qwen3_next",
    summary="Qwen3-Next: gated DeltaNet on three of four layers, gated attention, 10 of 512 experts and a shared one",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec(
        ARCHITECTURE,
        "qwen3_next",
        config_from_hf,
        config_to_hf,
        key_rules,
        mtp=MtpFiles(MTP_LAYERS, module_apart),
    ),
)
