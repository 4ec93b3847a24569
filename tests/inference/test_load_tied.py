"""A head that is tied to the embedding is one with it in a model that was loaded, wherever from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import nanovl
from nanovl.tokenizer.bpe import Tokenizer


@pytest.mark.parametrize("to", ["hf", "run", "safetensors"])
@torch.no_grad()
def test_tied_weights_stay_tied(to: str, tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    Tokenizer([]).save(tmp_path / "theirs")
    path = tmp_path / "theirs"
    if to != "hf":
        path = nanovl.convert(path, tmp_path / to, to=to)
    ours = nanovl.load(path, device="cpu").model
    assert ours.lm_head.weight is ours.embed_tokens.weight
    tokens = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 2e-5
