from __future__ import annotations

from math import sqrt

import pytest
import torch

from nanovl.models.blocks.init import InitConfig, initialize
from nanovl.parallelisms.init import init_weights
from nanovl.registry import family

NANOCHAT = InitConfig(
    std="fan_in", uniform=True, outputs="zero", ffn_scale=0.4, embedding_std=0.8, head_std=0.001
)


def drawn(config: InitConfig, name: str, *shape: int, norm_start: float = 1.0) -> torch.Tensor:
    full = torch.full(shape, torch.nan)
    generator = torch.Generator().manual_seed(0)
    initialize(config, name, full, generator, layers=8, norm_start=norm_start)
    return full


@pytest.mark.parametrize(
    ("config", "name", "std"),
    [
        (InitConfig(), "layers.0.mixer.q_proj.weight", 0.02),
        (InitConfig(), "layers.0.ffn.down_proj.weight", 0.02),
        (InitConfig(), "lm_head.weight", 0.02),
        (InitConfig(), "layers.0.ffn.router.weight", 0.02),
        (InitConfig(std=0.006), "embed_tokens.weight", 0.006),
        (InitConfig(outputs="depth_scaled"), "layers.3.mixer.o_proj.weight", 0.02 / sqrt(16)),
        (InitConfig(outputs="depth_scaled"), "layers.3.ffn.experts.down_proj", 0.02 / sqrt(16)),
        (InitConfig(outputs="depth_scaled"), "layers.3.mixer.v_proj.weight", 0.02),
        (NANOCHAT, "layers.0.mixer.k_proj.weight", 1 / 16),
        (NANOCHAT, "layers.0.ffn.up_proj.weight", 0.4 / 16),
        (NANOCHAT, "layers.0.ffn.down_proj.weight", 0.0),
        (NANOCHAT, "embed_tokens.weight", 0.8),
        (NANOCHAT, "lm_head.weight", 0.001),
    ],
)
def test_deviations(config: InitConfig, name: str, std: float) -> None:
    full = drawn(config, name, 512, 256)
    assert full.std().item() == pytest.approx(std, rel=0.02)
    if config.uniform and "layers" in name:
        assert full.abs().max() <= sqrt(3) * std


def test_biases_and_sinks_are_zero_and_norms_start_where_they_do_nothing() -> None:
    for name in ("layers.0.mixer.q_proj.bias", "layers.0.mixer.sinks", "layers.0.mixer.k_norm.bias"):
        assert drawn(NANOCHAT, name, 8).abs().max() == 0
    assert torch.equal(drawn(NANOCHAT, "layers.0.mixer.q_norm.weight", 8), torch.ones(8))
    assert torch.equal(drawn(NANOCHAT, "norm.weight", 8, norm_start=0.0), torch.zeros(8))


@pytest.mark.parametrize("name", ["llama3", "olmo2", "olmo3", "smollm3", "gemma3", "qwen3"])
def test_every_parameter_of_a_family_begins(name: str) -> None:
    found = family(name)
    model = found.model(found.flavors["debug"]())
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    init_weights(model, 0)
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        if "norm" in key:
            assert (parameter == (0.0 if name == "gemma3" else 1.0)).all(), key


def test_mistakes_name_the_key() -> None:
    assert InitConfig().mistakes() == NANOCHAT.mistakes() == []
    assert InitConfig(std=-0.1, head_std=-1.0).mistakes() == [
        "std = -0.1: wants 0 or more",
        "head_std = -1.0: wants 0 or more",
    ]
