"""Latent attention in the engine: what it remembers, and two ways to attend to that which are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanovl.inference.engine import Engine
from nanovl.models.blocks.mla import LatentAttention, MlaConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.rope import RopeConfig, RopeScaling
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig

PROMPTS = [[5, 17, 3], list(range(20, 61)), [7] * 4 + [1, 2, 3]]


def decoder(kernel: Any = "auto", **mixer: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "num_attention_heads": 4,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
    }
    config = DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        blocks={
            "latent": BlockConfig(
                mixer=MlaConfig(**{**sizes, **mixer}, kernel=kernel), ffn=MlpConfig(intermediate_size=48)
            )
        },
        pattern=["latent"],
    )
    config.validate()
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


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
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        row = list(prompt)
        with torch.no_grad():
            for logprob in completion.logprobs:
                logits = model(torch.tensor([row]))[0, -1]
                assert logits.log_softmax(-1).max().item() == pytest.approx(logprob, abs=1e-4)
                row.append(int(logits.argmax()))
        assert row[len(prompt) :] == completion.ids
    assert taken == {"expanded"}  # whole rows never fold: so does training


@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 2), (1, 6), (5, 6), (12, 20), (18, 20), (1, 60), (30, 60), (40, 60), (59, 60)]
)
def test_the_cheaper_way_is_taken_and_both_are_one(tokens: int, keys: int) -> None:
    model = decoder("eager")
    layer: Any = model.layers["0"].mixer
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = layer.config
    q = random(2, tokens, 4, config.qk_nope_head_dim), random(2, tokens, 4, config.qk_rope_head_dim)
    latents = random(2, keys, config.kv_lora_rank), random(2, keys, config.qk_rope_head_dim)
    positions = torch.arange(tokens).expand(2, -1)
    meta = model.meta(positions, None)
    meta.masks[None] = torch.ones(1, 1, tokens, keys, dtype=torch.bool).tril(keys - tokens)
    found, flops = {}, {}
    for way in ("folded", "expanded"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found[way] = getattr(layer, way)(*q, *latents, meta)
        flops[way] = counter.get_total_flops()
    torch.testing.assert_close(found["folded"], found["expanded"], rtol=1e-4, atol=1e-5)
    assert layer.folds(tokens, keys) == (flops["folded"] < flops["expanded"])


def test_its_memory_holds_latents_alone() -> None:
    engine = Engine(decoder())
    per_token = 3 * 4 * (24 + 8)  # 3 layers, 4 bytes; latent and turned key
    assert engine.memory().bytes_per_token == per_token
    engine.generate(PROMPTS, max_tokens=2)
    memory = engine.memory()
    assert memory.bytes_per_token == per_token
    stores = [store for *_, cached in engine.cache._seats for store in cached.stores()]
    assert memory.bytes == sum(store.nbytes for store in stores)
    assert all(not store[0].any() for store in stores)
