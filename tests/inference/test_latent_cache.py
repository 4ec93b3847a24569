"""Latent attention in the engine: what it remembers, and two ways to attend to that which are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_models import assert_as_whole_rows, decoder
from torch.utils.flop_counter import FlopCounterMode

from nanovl.inference.engine import Engine
from nanovl.models.blocks.mla import LatentAttention
from nanovl.models.blocks.rope import RopeConfig, RopeScaling
from nanovl.models.decoder import Decoder

PROMPTS = [[5, 17, 3], list(range(20, 61)), [7] * 4 + [1, 2, 3]]


def ways(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Filled with the ways in which the first layer attends."""
    taken = set()
    first = model.layers["0"].mixer

    def telling(way: str, attend: Any) -> Any:
        def told(self: LatentAttention, *args: Any) -> Any:
            taken.update([way] if self is first else [])
            return attend(self, *args)

        return told

    for way in ("folded", "expanded"):
        monkeypatch.setattr(LatentAttention, way, telling(way, getattr(LatentAttention, way)))
    return taken


YARN = RopeConfig(
    scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16, mscale_all_dim=1.0)
)


@pytest.mark.parametrize("prefill", [512, 7])
@pytest.mark.parametrize(
    "mixer", [{}, {"q_lora_rank": 12, "rope": YARN}, {"sliding_window": 9}], ids=["plain", "yarn", "window"]
)
def test_the_cache_generates_what_whole_rows_do(
    mixer: dict[str, Any], prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(**mixer)
    taken = ways(model, monkeypatch)
    completions = Engine(model, prefill_tokens=prefill).generate(PROMPTS, max_tokens=8)
    assert taken == {"folded", "expanded"}
    taken.clear()
    assert_as_whole_rows(model, PROMPTS, completions)
    assert taken == {"expanded"}  # whole rows never fold: so does training


@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 2), (1, 6), (5, 6), (12, 20), (18, 20), (1, 60), (30, 60), (40, 60), (59, 60)]
)
def test_the_cheaper_way_is_taken_and_both_are_one(tokens: int, keys: int) -> None:
    model = decoder(kernel="eager")
    layer: Any = model.layers["0"].mixer
    generator = torch.Generator().manual_seed(1)
    x, all_keys = (
        torch.randn(2, tokens, 32, generator=generator),
        torch.randn(2, keys, 32, generator=generator),
    )
    meta = model.meta(torch.arange(tokens).expand(2, -1), None)
    meta.masks[None] = torch.ones(1, 1, tokens, keys, dtype=torch.bool).tril(keys - tokens)
    cheaper = layer.folds(tokens, keys)
    layer.latents.forward = lambda _: all_keys
    found, flops = {}, {}
    for folds in (True, False):
        layer.folds = lambda *_, folds=folds: folds
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found[folds] = layer(x, meta)
        flops[folds] = counter.get_total_flops()
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)
    assert cheaper == (flops[True] < flops[False])


def test_its_memory_holds_latents_alone() -> None:
    engine = Engine(decoder())
    per_token = 2 * 4 * (24 + 8)  # 2 layers, 4 bytes; latent and turned key
    assert engine.memory().bytes_per_token == per_token
    engine.generate(PROMPTS, max_tokens=2)
    memory = engine.memory()
    assert memory.bytes_per_token == per_token
    stores = [store for *_, cached in engine.cache._seats for store in cached.stores()]
    assert memory.bytes == sum(store.nbytes for store in stores)
    assert all(not store[0].any() for store in stores)
