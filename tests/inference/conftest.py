"""Small models with weights large enough for every mistake to show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nanovl.checkpoint.hf import save_hf
from nanovl.config.schema import Model
from nanovl.registry import family, resolve_model
from nanovl.spec import ModelSpec
from nanovl.tokenizer.bpe import Tokenizer

SMALL = {"vocab_size": 97, "max_position_embeddings": 64}
WINDOWED = {"blocks": {"full": {"mixer": {"sliding_window": 5}}}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # windows 9, 9, 9, all; smear; value embeddings in layers 1 and 3; two query heads a key head
    "nanochat": (
        "nanochat",
        "d4",
        {
            "aspect_ratio": 16,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "short_window_divisor": 8,
            "short_window_multiple": 8,
        },
    ),
    "nanochat_v1": ("nanochat_v1", "d20", {"num_hidden_layers": 2, "hidden_size": 64}),
    "qwen3": ("qwen3", "debug", {"num_hidden_layers": 3}),
    "qwen3_windowed": ("qwen3", "debug", {"num_hidden_layers": 2, **WINDOWED}),
    # three layers of gated DeltaNet, one of attention; a larger eps for less rounding of an almost empty memory
    "qwen3_5": ("qwen3_5", "debug", {"norm": {"eps": 1e-2}}),
}

BuildModel = Callable[..., nn.Module]


@pytest.fixture
def build_model() -> BuildModel:
    """`build_model(case, **overrides)`: one of CASES, its parameters drawn anew, as some begin at 0."""

    def build(case: str, **overrides: Any) -> nn.Module:
        name, flavor, settings = CASES[case]
        small = {"max_position_embeddings": SMALL["max_position_embeddings"]}
        spec = resolve_model(
            Model(name=name, flavor=flavor, overrides={**small, **settings, **overrides}), 97
        )
        model = spec.family.model(spec.config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.25, generator=generator)
        return model

    return build


@pytest.fixture
def directory(build_model: BuildModel, tmp_path: Path) -> Path:
    """A Hugging Face directory: a model over bytes whose best tokens, five at least, are small letters."""
    model = build_model("qwen3", vocab_size=265)
    with torch.no_grad():
        model.lm_head.weight[: ord("a")] = 0.0
        model.lm_head.weight[ord("z") + 1 :] = 0.0
    spec = ModelSpec(family("qwen3"), model.config)
    save_hf(tmp_path / "model", dict(model.named_parameters()), spec, torch.float32)
    Tokenizer([]).save(tmp_path / "model")
    return tmp_path / "model"
