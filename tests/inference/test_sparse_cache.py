"""Sparse attention in the engine: keys are chosen among all that a request has cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_models import assert_as_whole_rows, decoder

from nanovl.inference.engine import Engine
from nanovl.models.blocks.indexer import IndexerConfig
from nanovl.models.decoder import Decoder

PROMPTS = [[5, 17, 3], list(range(20, 41)), [7] * 4 + [1, 2, 3]]


def sparse(**indexer: Any) -> Decoder:
    sizes = {"index_n_heads": 16, "index_head_dim": 12, "index_topk": 4, **indexer}
    return decoder(q_lora_rank=24, kv_lora_rank=16, indexer=IndexerConfig(**sizes))


@pytest.mark.parametrize("prefill", [512, 5])
def test_the_cache_generates_what_whole_rows_do(prefill: int) -> None:
    model, everything = sparse(), sparse(index_topk=64)
    completions = Engine(model, prefill_tokens=prefill).generate(PROMPTS, max_tokens=8)
    rows = assert_as_whole_rows(model, PROMPTS, completions)
    with torch.no_grad():
        far = [(everything(row) - model(row)).abs().max() for row in rows]
    assert max(far) > 0.1, "choosing keys makes no difference here"


def test_its_memory_holds_what_keys_are_scored_by() -> None:
    engine = Engine(sparse())
    per_token = 2 * 4 * (16 + 8 + 12)  # 2 layers, 4 bytes; latent, turned key, and the index
    assert engine.memory().bytes_per_token == per_token
    engine.generate(PROMPTS, max_tokens=2)
    assert engine.memory().bytes_per_token == per_token
    assert all(not store[0].any() for *_, cached in engine.cache._seats for store in cached.stores())
