"""Names of tensors that Hugging Face checkpoints of composed decoders share, and ours for them.

Traps: `post_attention_layernorm` stands before the MLP where norms come first, and behind attention everywhere else.
DeepSeek's rotation turns neighbouring channels, ours those half a head apart: rows of its projections are permuted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanovl.models.blocks.mla import MlaConfig
from nanovl.models.decoder import DecoderConfig
from nanovl.models.hf_config import MTP_LAYERS
from nanovl.spec import KeyGroup, KeyRule, MtpFiles

NORMS = {
    "pre": {"input_layernorm": "mixer_pre_norm", "post_attention_layernorm": "ffn_pre_norm"},
    "post": {"post_attention_layernorm": "mixer_post_norm", "post_feedforward_layernorm": "ffn_post_norm"},
    "sandwich": {
        "input_layernorm": "mixer_pre_norm",
        "post_attention_layernorm": "mixer_post_norm",
        "pre_feedforward_layernorm": "ffn_pre_norm",
        "post_feedforward_layernorm": "ffn_post_norm",
    },
}
ATTENTION = {
    **{
        f"self_attn.{linear}.{part}": f"mixer.{linear}.{part}"
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj")
        for part in ("weight", "bias")
    },
    **{f"self_attn.{norm}.weight": f"mixer.{norm}.weight" for norm in ("q_norm", "k_norm")},
    "self_attn.sinks": "mixer.sinks",
}
MLP = {
    f"mlp.{linear}.{part}": f"ffn.{linear}.{part}"
    for linear in ("gate_proj", "up_proj", "down_proj")
    for part in ("weight", "bias")
}
ROUTED = {
    "mlp.gate.weight": "ffn.router.weight",
    "mlp.gate.e_score_correction_bias": "ffn.router.expert_bias",
    **{
        f"mlp.shared_experts.{linear}.weight": f"ffn.shared_expert.{linear}.weight"
        for linear in ("gate_proj", "up_proj", "down_proj")
    },
}
"""Of experts in DeepSeek-V3 and those that follow it, but for the experts themselves."""
LATENT = {
    **{
        f"self_attn.{theirs}.{part}": f"mixer.{ours}.{part}"
        for theirs, ours in (("q_a_proj", "q_a_proj"), ("kv_b_proj", "kv_b_proj"), ("o_proj", "o_proj"))
        for part in ("weight", "bias")
    },
    "self_attn.q_a_layernorm.weight": "mixer.q_a_norm.weight",
    "self_attn.kv_a_layernorm.weight": "mixer.kv_a_norm.weight",
}


MTP = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "norm"}
THEIR_LAYER, LAYER = "model.layers.{i}.", "layers.{i}."
"""Where the tensors of a layer stand, there and here."""


def decoder_rules(
    config: DecoderConfig,
    layer: Mapping[str, str] = {**ATTENTION, **MLP},
    norms: Mapping[str, str] | None = None,
) -> list[KeyRule]:
    """The key map of a decoder whose layers hold the tensors of `layer`, theirs to ours, and `norms`, or those that
    `config` says."""
    if norms is None:
        norms = {a: b for block in config.layers() for a, b in NORMS[block.norm_placement].items()}
    every = {**{f"{a}.weight": f"{b}.weight" for a, b in norms.items()}, **layer}
    return [
        KeyRule("model.embed_tokens.weight", "embed_tokens.weight"),
        *(KeyRule(f"model.layers.{{i}}.{a}", f"layers.{{i}}.{b}") for a, b in every.items()),
        KeyRule("model.norm.weight", "norm.weight"),
        KeyRule("lm_head.weight", "lm_head.weight"),
    ]


def in_layers(rules: Sequence[KeyRule | KeyGroup], layers: Iterable[int]) -> list[KeyRule | KeyGroup]:
    """`rules` for these layers alone, where other layers have other tensors under the same names of ours."""

    def at(names: str | tuple[str, ...], layer: int) -> Any:
        if isinstance(names, str):
            return names.replace("{i}", str(layer))
        return tuple(name.replace("{i}", str(layer)) for name in names)

    return [
        replace(rule, theirs=at(rule.theirs, layer), ours=at(rule.ours, layer))
        for layer in layers
        for rule in rules
    ]


def with_mtp_rules(config: DecoderConfig, rules: Sequence[KeyRule | KeyGroup]) -> list[KeyRule | KeyGroup]:
    """`rules`, and those of multi-token prediction: DeepSeek keeps its modules as further layers, each with copies of
    the embedding and of the head, which have to be equal."""
    if config.mtp is None:
        return [*rules]
    places = range(config.num_hidden_layers, config.num_hidden_layers + config.mtp.num_layers)
    copies = {"embed_tokens.weight": ["embed_tokens"], "lm_head.weight": ["shared_head.head"]}
    if config.tie_word_embeddings:
        copies = {"embed_tokens.weight": ["embed_tokens", "shared_head.head"]}
    shared = [
        _copied(rule, [f"model.layers.{i}.{name}.weight" for i in places for name in copies[rule.ours]])
        if isinstance(rule, KeyRule) and rule.ours in copies
        else rule
        for rule in rules
    ]
    own = [KeyRule(f"model.layers.{{i}}.{a}.weight", f"mtp.{{i}}.{b}.weight") for a, b in MTP.items()]
    return [*shared, *in_layers([*moved(rules, THEIR_LAYER, "mtp.{i}.block."), *own], places)]


def module_behind_the_layers(name: str, layers: int) -> int | None:
    """The module that tensor `name` belongs to, in DeepSeek's checkpoints."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match and int(match[1]) >= layers else None


MTP_BEHIND = MtpFiles(MTP_LAYERS, module_behind_the_layers)
"""Of DeepSeek-V3 and those that follow it."""


def moved(rules: Sequence[KeyRule | KeyGroup], theirs: str, ours: str) -> list[KeyRule | KeyGroup]:
    """Those of `rules` that are of any layer, for a layer whose tensors' names begin so instead."""

    def at(names: str | tuple[str, ...], old: str, new: str) -> Any:
        if isinstance(names, str):
            return names.replace(old, new, 1)
        return tuple(name.replace(old, new, 1) for name in names)

    return [
        replace(rule, theirs=at(rule.theirs, THEIR_LAYER, theirs), ours=at(rule.ours, LAYER, ours))
        for rule in rules
        if (rule.ours if isinstance(rule, KeyRule) else rule.ours[0]).startswith(LAYER)
    ]


def _copied(rule: KeyRule, copies: Sequence[str]) -> KeyGroup:
    """`rule` where the same tensor also stands under other names."""

    def mistakes(values: Sequence[Tensor]) -> list[str]:
        return [
            f"{name} is not equal to {rule.theirs}, which multi-token prediction shares here; "
            "a module with an embedding or a head of its own cannot be read"
            for name, value in zip(copies, values[1:], strict=True)
            if not torch.equal(value, values[0])
        ]

    def every(values: Sequence[Tensor]) -> Sequence[Tensor]:
        return [values[0], *(values[0].clone() for _ in copies)]  # files hold no tensor twice

    return KeyGroup((rule.theirs, *copies), (rule.ours,), lambda values: values[:1], every, mistakes)


GATED = ("gate_proj", "up_proj", "down_proj")


def one_rule_an_expert(experts: int, at: str = "mlp.experts", names: Sequence[str] = GATED) -> list[KeyGroup]:
    """The key map of gated experts that are a tensor each: those of gate, up and down are called `names`."""
    theirs = f"model.layers.{{i}}.{at}"
    return [
        KeyGroup(
            tuple(f"{theirs}.{expert}.{name}.weight" for expert in range(experts)),
            (f"layers.{{i}}.ffn.experts.{linear}",),
            lambda values: [torch.stack([*values])],
            lambda values: values[0].unbind(),
        )
        for linear, name in zip(GATED, names, strict=True)
    ]


def expert_rules(experts: int) -> list[KeyGroup]:
    """The key map of gated experts: one tensor an expert, as transformers writes them; read also stacked, gate and up
    in one, as it has them in memory."""
    theirs, ours = "model.layers.{i}.mlp.experts", "layers.{i}.ffn.experts"
    stacked = KeyGroup(
        (f"{theirs}.gate_up_proj",),
        (f"{ours}.gate_proj", f"{ours}.up_proj"),
        lambda values: values[0].chunk(2, dim=1),
        lambda values: [torch.cat([*values], dim=1)],
    )
    down = KeyGroup((f"{theirs}.down_proj",), (f"{ours}.down_proj",), list, list)
    return [*one_rule_an_expert(experts), stacked, down]


def latent_rules(mixer: MlaConfig) -> list[KeyRule]:
    """The key map of latent attention in DeepSeek's checkpoints."""
    latent, heads = mixer.kv_lora_rank + mixer.qk_rope_head_dim, mixer.qk_head_dim
    turned = mixer.qk_rope_head_dim
    permuted = [
        ("q_proj.weight", "q_proj.weight", heads),
        ("q_b_proj.weight", "q_b_proj.weight", heads),
        ("kv_a_proj_with_mqa.weight", "kv_a_proj.weight", latent),
        ("kv_a_proj_with_mqa.bias", "kv_a_proj.bias", latent),
    ]
    return [
        *(KeyRule(f"model.layers.{{i}}.{a}", f"layers.{{i}}.{b}") for a, b in LATENT.items()),
        *(
            KeyRule(
                f"model.layers.{{i}}.self_attn.{theirs}",
                f"layers.{{i}}.mixer.{ours}",
                rows_permuted(size, turned, halves=True),
                rows_permuted(size, turned, halves=False),
            )
            for theirs, ours, size in permuted
        ),
    ]


def rows_permuted(size: int, turned: int, *, halves: bool) -> Callable[[Tensor], Tensor]:
    """For heads of `size` rows whose last `turned` make pairs: neighbours -> half of them apart, or back."""
    pairs = torch.arange(size - turned, size).view((-1, 2) if halves else (2, -1))
    order = torch.cat((torch.arange(size - turned), pairs.T.flatten()))
    return lambda value: value.unflatten(0, (-1, size))[:, order.to(value.device)].flatten(0, 1)
