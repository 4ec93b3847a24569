"""Small decoders of latent attention, and what the engine must make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanovl.inference.request import Completion
from nanovl.models.blocks.mla import MlaConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig


def decoder(**mixer: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "num_attention_heads": 4,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
    }
    block = BlockConfig(mixer=MlaConfig(**{**sizes, **mixer}), ffn=MlpConfig(intermediate_size=48))
    config = DecoderConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, blocks={"latent": block}, pattern=["latent"]
    )
    config.validate()
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def assert_as_whole_rows(
    model: Decoder, prompts: Sequence[list[int]], completions: Sequence[Completion]
) -> list[Tensor]:
    """Tokens and log-probabilities are those of running each row whole for every token; returns the rows."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        row = list(prompt)
        with torch.no_grad():
            for logprob in completion.logprobs:
                logits = model(torch.tensor([row]))[0, -1]
                assert logits.log_softmax(-1).max().item() == pytest.approx(logprob, abs=1e-4)
                row.append(int(logits.argmax()))
        assert row[len(prompt) :] == completion.ids
        rows.append(torch.tensor([row]))
    return rows
