"""Random decoders: every field of the typed configs takes any value of its type.

Booleans, choices and sections are read off the types, so a new one joins by itself; numbers have to be given values.
"""

from __future__ import annotations

import dataclasses
import random
import typing
from typing import Annotated, Any, Literal, Union

from nanovl.errors import ConfigError
from nanovl.models.decoder import BlockConfig, DecoderConfig

VALUES: dict[str, list[Any]] = {
    # DecoderConfig
    "vocab_size": [61],
    "hidden_size": [24, 32],
    "num_hidden_layers": [2, 3, 4],
    "embed_scale": [1.0, "sqrt_hidden_size", 3.0],
    "final_logit_softcapping": [None, 5.0],
    "logit_scale": [1.0, 0.5],
    "max_position_embeddings": [64],
    # mixers
    "num_attention_heads": [2, 4, 6],
    "num_key_value_heads": [1, 2, 4, 6],
    "head_dim": [8, 12],
    "sliding_window": [None, 1, 4, 9],
    "query_pre_attn_scalar": [None, 5],
    "attn_logit_softcapping": [None, 2.0],
    "attn_temperature_len": [None, 3],
    "kernel": ["auto", "sdpa", "eager"],  # the others run on a GPU alone
    "q_lora_rank": [None, 10],
    "kv_lora_rank": [8, 14],
    "qk_nope_head_dim": [6, 8],
    "qk_rope_head_dim": [4, 8],
    "v_head_dim": [6, 12],
    "latent_norm_eps": [1e-6, 1e-4],
    "index_n_heads": [16, 20],  # with fewer, scores tie at 0
    "index_head_dim": [8, 12],
    "index_topk": [1, 3, 7],
    "num_key_heads": [1, 2],
    "num_value_heads": [2, 4],
    "key_head_dim": [8],
    "value_head_dim": [6, 8],
    "conv_kernel_size": [1, 2, 4],
    # rotations
    "theta": [1e4, 30.0],
    "partial_rotary_factor": [1.0, 0.5],
    "factor": [1.0, 4.0],
    "original_max_position_embeddings": [8],
    "low_freq_factor": [1.0],
    "high_freq_factor": [4.0],
    "beta_fast": [32.0, 2.0],
    "beta_slow": [1.0],
    "attention_factor": [None, 1.2],
    "mscale": [None, 0.7],
    "mscale_all_dim": [None, 1.0],
    # feed-forward
    "intermediate_size": [20],
    "num_experts": [4, 8],
    "num_experts_per_tok": [1, 2, 3],
    "moe_intermediate_size": [8, 12],
    "routed_scaling_factor": [1.0, 2.5],
    "router_logit_softcapping": [None, 2.0],
    "output_scale": [1.0, 0.7],
    "n_group": [1, 2],
    "topk_group": [1, 2],
    "shared_expert_intermediate_size": [0, 12],
    "bias_update_speed": [0.001],
    "aux_loss_coef": [0.0, 0.01],
    "sequence_aux_loss_coef": [0.0, 0.01],
    "z_loss_coef": [0.0, 0.01],
    # multi-token prediction
    "num_layers": [1, 2],
    "block": [None, "a"],
    "loss_weight": [0.3],
    # norms, and how weights begin
    "eps": [1e-5, 1e-3],
    "std": [0.02, "fan_in"],
    "ffn_scale": [1.0, 0.4],
    "embedding_std": [None, 0.8],
    "head_std": [None, 0.001],
}
"""By field, the values of what has no end of them."""
LAYERS = ("blocks", "pattern", "prefix", "suffix")
"""What `draw_decoder` makes up itself."""


def options(kind: Any) -> list[Any]:
    """What a field of this type may hold, dataclasses as themselves; [] where there is no end of it."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (Union, type(int | None)):
        parts = [options(part) for part in typing.get_args(kind)]
        return [] if [] in parts else [value for part in parts for value in part]
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if kind is bool:
        return [False, True]
    if kind is type(None):
        return [None]
    return [kind] if dataclasses.is_dataclass(kind) else []


def choices(kind: type[Any], leave_out: typing.Collection[str] = ()) -> dict[str, list[Any]]:
    """Field of dataclass `kind` -> what it may hold. Raises AssertionError for a field nobody has given values."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if name in leave_out:
            continue
        found[name] = VALUES.get(name) or options(hint)
        assert found[name], f"{kind.__name__}.{name}: give it values in {__name__}.VALUES"
    return found


def draw(kind: type[Any], source: random.Random, **fixed: Any) -> Any:
    """A `kind` that its own rules allow, with `fixed` fields."""
    while True:
        made = kind(
            **{
                name: draw(value, source) if isinstance(value, type) else value
                for name, values in choices(kind, fixed).items()
                for value in [source.choice(values)]
            },
            **fixed,
        )
        mistakes = getattr(made, "mistakes", None)
        # a rotation can be judged only with the width that it turns
        if mistakes is None or mistakes.__code__.co_argcount > 1 or not mistakes():
            return made


def draw_decoder(seed: int) -> DecoderConfig:
    """Decoder number `seed`: up to three kinds of layers in any order."""
    source = random.Random(seed)
    names = ["a", "b", "c"][: source.randint(1, 3)]
    while True:
        fixed = {
            "blocks": {name: draw(BlockConfig, source) for name in names},
            "pattern": [source.choice(names) for _ in range(source.randint(1, 3))],
            "prefix": [source.choice(names) for _ in range(source.randint(0, 1))],
            "suffix": [source.choice(names) for _ in range(source.randint(0, 1))],
        }
        config: DecoderConfig = draw(DecoderConfig, source, **fixed)
        try:
            config.validate()
        except ConfigError:
            continue
        return config


def fields_of(value: Any) -> typing.Iterator[tuple[str, Any]]:
    """(class and field, what it holds) of a config and all below it; a section is told by its class."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from fields_of(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            shown = type(held) if dataclasses.is_dataclass(held) else held
            if not isinstance(held, dict | list):
                yield f"{type(value).__name__}.{field.name}", shown
            yield from fields_of(held)
