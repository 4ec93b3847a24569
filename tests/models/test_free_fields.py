"""Fields that say how a model begins, learns or runs do not keep it from weights that know nothing of them."""

from __future__ import annotations

from typing import Any

from nanovl.build import differences
from nanovl.config.schema import Model
from nanovl.registry import resolve_model
from nanovl.spec import ModelSpec

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
