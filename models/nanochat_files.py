"""nanochat's own checkpoints, `model_*.pt` beside `meta_*.json`: names of tensors, and the era they are of.

The meta file knows sizes alone, so the tensors tell the era, by their names and by the width of a gate. One thing
they cannot tell, the cap of logits from January to March 2026: the meta file has to be given it.

nanochat rotates by -angle. Scores depend on differences of angles alone, so that is our rotation with the halves of
every query and key head swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanovl.errors import ConfigError
from nanovl.models.nanochat_config import ERAS, NanochatConfig
from nanovl.spec import KeyGroup, KeyRule

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
"""What `model_config` of a meta file has held from the first release on."""
PADDED = 64
"""Rows of vocabulary tables come in this multiple since December 2025."""
UNCHANGED = {
    "attn.c_v": "mixer.v_proj",
    "attn.c_proj": "mixer.o_proj",
    "mlp.c_fc": "ffn.up_proj",
    "mlp.c_proj": "ffn.down_proj",
}


def halves_swapped(head_dim: int) -> Callable[[Tensor], Tensor]:
    """The rows of every head with its halves swapped; its own inverse."""

    def swap(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)

    return swap


def block_rules(head_dim: int) -> list[KeyRule]:
    """The key map of what all eras have in a block."""
    swap = halves_swapped(head_dim)
    block, ours = "transformer.h.{i}", "layers.{i}"
    return [
        *(KeyRule(f"{block}.{a}.weight", f"{ours}.{b}.weight") for a, b in UNCHANGED.items()),
        *(
            KeyRule(f"{block}.attn.c_{a}.weight", f"{ours}.mixer.{a}_proj.weight", swap, swap)
            for a in ("q", "k")
        ),
    ]


def key_rules(config: NanochatConfig) -> list[KeyRule | KeyGroup]:
    """The key map of every era from January 2026 on."""

    def lambdas(theirs: str, ours: str) -> KeyGroup:
        """One vector there, one number a layer here."""
        names = tuple(f"layers.{i}.blend.{ours}" for i in range(config.depth))
        return KeyGroup(
            (theirs,),
            names,
            lambda values: values[0].view(len(names), 1).unbind(),
            lambda values: [torch.cat([*values])],
        )

    return [
        KeyRule("transformer.wte.weight", "embed_tokens.weight"),
        KeyRule("lm_head.weight", "lm_head.weight"),
        *block_rules(config.head_dim),
        KeyRule("value_embeds.{i}.weight", "layers.{i}.mixer.value_embed.weight"),
        KeyRule("transformer.h.{i}.attn.ve_gate.weight", "layers.{i}.mixer.value_gate.weight"),
        lambdas("resid_lambdas", "stream"),
        lambdas("x0_lambdas", "embedding"),
        KeyRule("smear_gate.weight", "smear.gate.weight"),
        KeyRule("smear_lambda", "smear.scale"),
        KeyRule("backout_lambda", "backout.scale"),
    ]


def config_from_meta(meta: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> NanochatConfig | None:
    """The config of tensors of an era from January 2026 on; None for those of the first release. Raises ConfigError."""
    if "resid_lambdas" not in shapes:
        return None
    sizes = sizes_of(meta)
    depth, hidden, heads = sizes["n_layer"], sizes["n_embd"], sizes["n_head"]
    head_dim, vocab = hidden // heads, sizes["vocab_size"]
    rows = shapes.get("transformer.wte.weight", [0])[0]
    fields = dict(ERAS[_era(shapes)])
    if (given := stated_cap(meta)) is not None:
        fields["softcap"] = given
    elif fields == ERAS["2026-01-18"]:
        raise ConfigError(
            "the meta file does not say how logits are capped, and its tensors cannot: at 15 by models trained from "
            '18 January to 1 March 2026, at 20 by those of 2 to 8 March; add "softcap": 15 or "softcap": 20 to it'
        )
    return NanochatConfig(
        vocab_size=vocab,
        vocab_multiple=PADDED if rows == -(-vocab // PADDED) * PADDED else 1,
        depth=depth,
        aspect_ratio=_aspect_ratio(depth, hidden, head_dim),
        head_dim=head_dim,
        num_key_value_heads=0 if sizes["n_kv_head"] == heads else sizes["n_kv_head"],
        max_position_embeddings=sizes["sequence_len"],
        window_pattern=_window_pattern(meta, fields.get("short_window_multiple") == 1),
        **fields,
    )


def stated_cap(meta: Mapping[str, Any]) -> float | None:
    """The cap of logits that a user has added to a meta file. Raises ConfigError."""
    given = meta.get("softcap")
    if given is not None and (not isinstance(given, int | float) or given <= 0):
        raise ConfigError(f"softcap = {given!r} in the meta file: wants a number above 0")
    return None if given is None else float(given)


def sizes_of(meta: Mapping[str, Any]) -> dict[str, int]:
    """`model_config` of a meta file, but for its windows. Raises ConfigError with all that is amiss."""
    given = meta.get("model_config")
    if not isinstance(given, dict):
        raise ConfigError("the meta file has no model_config")
    wrong = [
        f"model_config.{key} = {given.get(key)!r}: wants a number above 0"
        for key in SIZES
        if not isinstance(given.get(key), int) or given[key] <= 0
    ]
    wrong += [
        f"model_config.{key} = {given[key]!r}: no nanochat has it"
        for key in given
        if key not in (*SIZES, "window_pattern")
    ]
    if not wrong and given["n_embd"] % given["n_head"]:
        wrong.append(
            f"model_config.n_embd = {given['n_embd']}: is not a multiple of n_head = {given['n_head']}"
        )
    if wrong:
        raise ConfigError(wrong)
    return {key: given[key] for key in SIZES}


def _era(shapes: Mapping[str, Sequence[int]]) -> str:
    """The first day on which nanochat had these tensors."""
    if "smear_gate.weight" in shapes:
        return "2026-03-14"
    gates = [shape for name, shape in shapes.items() if name.endswith(".attn.ve_gate.weight")]
    if not gates:
        return "2026-01-11"
    width = gates[0][-1]
    if width not in (32, 12):
        raise ConfigError(
            f"attn.ve_gate reads {width} channels, and no nanochat's does: theirs read 32 or 12"
        )
    return "2026-01-18" if width == 32 else "2026-03-09"


def _aspect_ratio(depth: int, hidden: int, head_dim: int) -> int:
    """Channels a layer of depth that make `hidden` channels: nanochat's own 64 if they do."""
    for ratio in (64, hidden // depth):
        if ratio and -(-depth * ratio // head_dim) * head_dim == hidden:
            return ratio
    raise ConfigError(f"model_config: no channels a layer make n_embd = {hidden} of n_layer = {depth}")


def _window_pattern(meta: Mapping[str, Any], rounds_down: bool) -> str:
    """The windows of the layers: all long where the file is silent."""
    pattern = str(meta["model_config"].get("window_pattern", "L")).upper()
    context = meta["model_config"]["sequence_len"]
    if rounds_down and "S" in pattern and context % 2:
        raise ConfigError(
            f"model_config.sequence_len = {context}: half of it, the short window, is no whole number"
        )
    return pattern
