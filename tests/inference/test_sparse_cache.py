"""Sparse attention in the engine: keys are chosen among all that a request has cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nanovl.inference.engine import Engine
from nanovl.models.blocks.indexer import IndexerConfig
from nanovl.models.blocks.mla import MlaConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig

PROMPTS = [[5, 17, 3], list(range(20, 41)), [7] * 4 + [1, 2, 3]]


def decoder(**indexer: Any) -> Decoder:
    sizes = {"index_n_heads": 16, "index_head_dim": 12, "index_topk": 4, **indexer}
    mixer = MlaConfig(
        num_attention_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        indexer=IndexerConfig(**sizes),
    )
    config = DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        blocks={"sparse": BlockConfig(mixer=mixer, ffn=MlpConfig(intermediate_size=48))},
        pattern=["sparse"],
    )
    config.validate()
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("prefill", [512, 5])
def test_the_cache_generates_what_whole_rows_do(prefill: int) -> None:
    model = decoder()
    engine = Engine(model, prefill_tokens=prefill)
    completions = engine.generate(PROMPTS, max_tokens=8)
    row_differs = False
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        row = list(prompt)
        with torch.no_grad():
            for logprob in completion.logprobs:
                logits = model(torch.tensor([row]))[0, -1]
                assert logits.log_softmax(-1).max().item() == pytest.approx(logprob, abs=1e-4)
                row.append(int(logits.argmax()))
            everything = decoder(index_topk=64)(torch.tensor([row]))
            row_differs |= bool((everything - model(torch.tensor([row]))).abs().max() > 0.1)
        assert row[len(prompt) :] == completion.ids
    assert row_differs, "choosing keys makes no difference here"


def test_its_memory_holds_what_keys_are_scored_by() -> None:
    engine = Engine(decoder())
    per_token = 2 * 4 * (16 + 8 + 12)  # 2 layers, 4 bytes; latent, turned key, and the index
    assert engine.memory().bytes_per_token == per_token
    engine.generate(PROMPTS, max_tokens=2)
    assert engine.memory().bytes_per_token == per_token
    assert all(not store[0].any() for *_, cached in engine.cache._seats for store in cached.stores())
