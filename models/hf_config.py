"""What the config.json files of composed decoders have in common; a family's file says what is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nanovl.config.config_json import ConfigJson
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.mla import MlaConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.mtp import MtpConfig
from nanovl.models.blocks.rope import RopeConfig, RopeScaling
from nanovl.models.decoder import DecoderConfig
from nanovl.spec import computed

SLIDING = MappingProxyType({"sliding_attention": "sliding", "full_attention": "full"})
"""What layers are called by transformers and here."""
MTP_LAYERS = "num_nextn_predict_layers"
"""Key of the depth of multi-token prediction."""
SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}
"""What each kind of rotation scaling reads."""


def sizes_from_hf(hf: ConfigJson, *, tie: bool = False) -> dict[str, Any]:
    """Arguments of a family's builder from config.json; `tie` = what the class does where the file is silent."""
    heads = hf["num_attention_heads"]
    return {
        **body_from_hf(hf, tie=tie),
        "ffn": hf["intermediate_size"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
    }


def body_from_hf(hf: ConfigJson, *, tie: bool = False) -> dict[str, Any]:
    """Those that builders of all families have."""
    return {
        "layers": hf["num_hidden_layers"],
        "hidden": hf["hidden_size"],
        "vocab": hf["vocab_size"],
        "eps": hf["rms_norm_eps"],
        "context": hf["max_position_embeddings"],
        "tie": hf.get("tie_word_embeddings", tie),
    }


def sizes_of(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """The same arguments from a config. Raises ConfigError where it has experts."""
    mixer, ffn = dense(config, architecture)
    return {**body_of(config), **heads_of(mixer), "ffn": ffn.intermediate_size}


def body_of(config: DecoderConfig) -> dict[str, Any]:
    """The same as of `body_from_hf`."""
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "eps": config.norm.eps,
        "context": config.max_position_embeddings,
        "tie": config.tie_word_embeddings,
    }


def heads_of(mixer: AttentionConfig) -> dict[str, Any]:
    """Those of attention's sizes."""
    return {
        "heads": mixer.num_attention_heads,
        "kv_heads": mixer.num_key_value_heads,
        "head_dim": mixer.head_dim,
    }


def dense(config: DecoderConfig, architecture: str, name: str = "") -> tuple[AttentionConfig, MlpConfig]:
    """Attention and MLP of template `name`, of the first if none is named. Raises ConfigError for other kinds."""
    block = config.blocks[name or next(iter(config.blocks))]
    if not isinstance(block.mixer, AttentionConfig) or not isinstance(block.ffn, MlpConfig):
        raise ConfigError(f"model: is not made of attention and MLPs, as {architecture} is")
    return block.mixer, block.ffn


def sizes_to_hf(config: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """The keys of config.json that all dense families write."""
    mixer, ffn = dense(config, architecture)
    common = decoder_to_hf(config, mixer, architecture, model_type)
    return {**common, "intermediate_size": ffn.intermediate_size}


def decoder_to_hf(
    config: DecoderConfig, mixer: AttentionConfig | MlaConfig, architecture: str, model_type: str
) -> dict[str, Any]:
    """The keys of config.json that all families write."""
    std = config.init.std
    heads = mixer.num_attention_heads
    if isinstance(mixer, AttentionConfig):
        kv_heads, head_dim = mixer.num_key_value_heads, mixer.head_dim
    else:
        kv_heads, head_dim = heads, mixer.qk_rope_head_dim  # so transformers calls what turns
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config.norm.eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": 0.02 if std == "fan_in" else std,
        # those that classes of transformers would put in are of other tokenizers
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def same_or_refuse(config: DecoderConfig, plain: DecoderConfig, architecture: str) -> None:
    """Raises ConfigError where `config` computes something else than `plain`, naming every field.

    How the layers' names are tiled makes no difference to a checkpoint.
    """
    plain.prefix, plain.pattern, plain.suffix = config.prefix, config.pattern, config.suffix
    found, wanted = computed(config), computed(plain)
    wrong = [
        f"model.{key} = {found.get(key)!r}: cannot be written; {architecture} has {wanted.get(key)!r} there"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if wrong and config.mtp is not None and plain.mtp is None:
        wrong.append("model.mtp: `nanovl convert --without-mtp` leaves the modules away")
    if wrong:
        raise ConfigError(wrong)


def mtp_of(config: DecoderConfig, depths: int, block: str) -> MtpConfig | None:
    """`depths` modules whose layers have template `block`, as released; none where that is 0."""
    named = config.mtp is not None and config.mtp.block == block
    last = config.layer_names()[-1] == block
    return MtpConfig(num_layers=depths, block=block if named or not last else None) if depths else None


def rope_from_hf(
    hf: ConfigJson, *, theta: float = 10_000.0, partial: float = 1.0, silent: Mapping[str, Any] | None = None
) -> RopeConfig:
    """The rotation of a config.json with one for all layers, as written by transformers 4 or 5.

    `theta` and `partial`, its share of a head's channels, hold where the file is silent about them, `silent` where it
    is silent about rotations.
    """
    top = {
        "rope_theta": hf.get("rope_theta", theta),
        "partial_rotary_factor": hf.get("partial_rotary_factor", partial),
    }
    old, new = hf.get("rope_scaling"), hf.get("rope_parameters")
    if old and new and any(new[key] != old[key] for key in old.keys() & new.keys()):
        hf.refuse("rope_parameters", "rope_scaling, which transformers prefers, says something else")
    if not old and not new and "rope_parameters" not in hf:
        top |= silent or {}
    return rope_of(
        hf.table("rope_scaling" if old else "rope_parameters", **top), hf["max_position_embeddings"]
    )


def rope_of(given: ConfigJson, context: int) -> RopeConfig:
    """The rotation of one `rope_parameters` of transformers."""
    old = given.get("type", "default")
    kind = given.get("rope_type", old)
    if kind != "default" and kind not in SCALING:
        given.refuse("rope_type" if "rope_type" in given else "type", f"wants default, {', '.join(SCALING)}")
        kind = "default"
    theta, partial = float(given["rope_theta"]), given.get("partial_rotary_factor", 1.0)
    if kind == "default":
        return RopeConfig(theta=theta, partial_rotary_factor=partial)
    read = {key: given.get(key) for key in SCALING[kind]}
    said = {key: value for key, value in read.items() if value is not None}
    if kind != "linear":
        said.setdefault("original_max_position_embeddings", context)
    said.setdefault("factor", context / said.get("original_max_position_embeddings", context))
    return RopeConfig(theta=theta, partial_rotary_factor=partial, scaling=RopeScaling(kind=kind, **said))


def rope_parameters(rope: RopeConfig | None) -> dict[str, Any]:
    """`rope` as transformers 5 writes it. Raises ConfigError where there is none."""
    if rope is None:
        raise ConfigError("model: its layers have no rotation, which config.json cannot say")
    said: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.partial_rotary_factor != 1.0:
        said["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.scaling is not None:
        said["rope_type"] = rope.scaling.kind
        values = {key: getattr(rope.scaling, key) for key in SCALING[rope.scaling.kind]}
        said.update({key: value for key, value in values.items() if value is not None})
    return said


def rope_to_hf(rope: RopeConfig | None) -> dict[str, Any]:
    """Keys of config.json for a rotation of all layers, in the form that transformers 4 and 5 read."""
    said = rope_parameters(rope)
    theta = said.pop("rope_theta")
    partial = said.pop("partial_rotary_factor", None)
    keys = {"rope_theta": theta, "rope_scaling": None if said["rope_type"] == "default" else said}
    return keys if partial is None else {**keys, "partial_rotary_factor": partial}


def tiling(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """A pattern that tiles to `names`: the family's usual one if it does, else the shortest."""
    candidates = [list(usual), *(list(names[: n + 1]) for n in range(len(names)))]
    return next(p for p in candidates if all(p[i % len(p)] == name for i, name in enumerate(names)))


def layer_types(hf: ConfigJson, *, period: int, kinds: Mapping[str, str] = SLIDING) -> list[str]:
    """The name here of each layer of a config.json, which calls them by the keys of `kinds`.

    Where it is silent, every layer at a multiple of `period` is of the last kind, the others of the first.
    """
    names = list(kinds.values())
    named = hf.get("layer_types")
    if named is None:
        return [names[-1] if (i + 1) % period == 0 else names[0] for i in range(hf["num_hidden_layers"])]
    hf.a_layer_each("layer_types")
    if strange := sorted(set(named) - kinds.keys()):
        hf.refuse("layer_types", f"{', '.join(strange)} is none of {', '.join(kinds)}")
    return [kinds.get(name, names[0]) for name in named]


def no_windows(hf: ConfigJson) -> None:
    """Mistakes where some layer has a window, in a class that could."""
    hf.expect(use_sliding_window=False)
    hf.ignore("sliding_window")
    layer_types(hf, period=1, kinds={"full_attention": "full"})


def sliding_window(hf: ConfigJson, names: Sequence[str]) -> int | None:
    """Keys that layers called `sliding` see. A mistake where it is null and there are some: transformers raises."""
    window: int | None = hf["sliding_window"]
    if window is None and "sliding" in names:
        hf.refuse("sliding_window", "wants a whole number above 0, since some layers are sliding")
    return window


def layer_ropes(hf: ConfigJson, *, full: float, sliding: float) -> dict[str, RopeConfig]:
    """The rotations of full and of sliding layers, whose bases are `full` and `sliding` where a config.json is silent.

    An older file's `rope_scaling` is that of full layers. `rope_parameters` without layer types are a mistake:
    transformers 5.23 silently drops their scaling.
    """
    given = hf.get("rope_parameters")
    if given is None:
        tables = {
            "full": hf.table("rope_scaling", rope_theta=full),
            "sliding": hf.table("rope_parameters", rope_theta=sliding),
        }
    else:
        if hf.get("rope_scaling"):
            hf.refuse("rope_scaling", "rope_parameters are there too; say it in those")
        each = given.keys() <= {"full_attention", "sliding_attention"}
        if not each:
            hf.refuse("rope_parameters", "wants one for full_attention and one for sliding_attention")
        outer = hf.table("rope_parameters") if each else ConfigJson({}, hf.family)
        tables = {
            "full": outer.table("full_attention", rope_theta=full),
            "sliding": outer.table("sliding_attention", rope_theta=sliding),
        }
    for table in tables.values():
        if not table.get("truncate", True):
            table.refuse(
                "truncate", "transformers 5.23 ignores it beside layer types; take it out, or set it to true"
            )
    return {name: rope_of(table, hf["max_position_embeddings"]) for name, table in tables.items()}


def layer_types_to_hf(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """Keys of config.json for layers `sliding` and `full`, each kind with its rotation."""
    ropes = {}
    for name in ("sliding", "full"):
        ropes[f"{name}_attention"] = rope_parameters(dense(config, architecture, name)[0].rope)
        if not ropes[f"{name}_attention"].get("truncate", True):
            raise ConfigError(
                f"model.blocks.{name}.mixer.rope.scaling.truncate = false: transformers ignores it here"
            )
    return {
        "layer_types": [f"{name}_attention" for name in config.layer_names()],
        "rope_parameters": ropes,
        "sliding_window": dense(config, architecture, "sliding")[0].sliding_window,
    }
