"""Fields that say how a model begins, learns or runs do not keep it from weights that know nothing of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanovl.config.schema import Model
from nanovl.initial import differences
from nanovl.registry import resolve_model
from nanovl.spec import ModelSpec, ungrown

FREE_ONES = {
    "init": {"std": 0.01},
    "blocks": {
        "full": {
            "mixer": {"kernel": "eager"},
            "ffn": {
                "bias_update_speed": 0.0,
                "aux_loss_coef": 0.1,
                "sequence_aux_loss_coef": 0.1,
                "z_loss_coef": 0.1,
            },
        }
    },
}


def spec(name: str = "qwen3_moe", flavor: str = "debug", **overrides: Any) -> ModelSpec:
    return resolve_model(Model(name=name, flavor=flavor, overrides=overrides), 512)


def test_free_fields_may_differ_from_those_of_weights() -> None:
    changed = spec(**FREE_ONES)
    assert changed.config != spec().config
    assert differences(spec(), changed) == []
    assert changed.family.hf is not None
    assert changed.family.hf.config_to_hf(changed.config)["num_experts"] == 8


def test_every_other_field_is_named() -> None:
    rope = {"full": {"mixer": {"rope": {"theta": 5e5}}, "ffn": {"load_balancing": "bias"}}}
    assert differences(spec(), spec(blocks=rope)) == [
        "model.blocks.full.ffn.load_balancing = 'bias': it has 'none'",
        "model.blocks.full.mixer.rope.theta = 500000.0: it has 1000000.0",
    ]
    assert differences(spec(), spec("nanochat", "d8")) == ["model.name = 'nanochat': it is a qwen3_moe"]


def test_what_an_indexer_learns_from_leaves_weights_alone() -> None:
    of = {"mixer": {"indexer": {"index_loss": "none"}}}
    assert differences(spec("deepseek_v32"), spec("deepseek_v32", blocks={"moe": of, "dense": of})) == []


def test_parts_that_are_lacking_are_left_out() -> None:
    v3, v32 = spec("deepseek_v3"), spec("deepseek_v32", mtp={"num_layers": 1})
    assert differences(v3, v32)
    grown = ungrown(v32.config, v3.config)
    assert differences(v3, replace(v32, config=grown)) == []
    assert grown.mtp is None
    assert grown.blocks["moe"].mixer.indexer is None
    assert ungrown(v32.config, v32.config) == v32.config
    # a rotation's scaling has no weights: it is no part that could be lacking
    stretched = {"full": {"mixer": {"rope": {"scaling": {"kind": "linear", "factor": 2.0}}}}}
    assert differences(spec(), replace(spec(), config=ungrown(spec(blocks=stretched).config, spec().config)))
