"""Small Hugging Face directories, written by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from nanovl.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="session")
def experts_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with experts in bfloat16, in several shards."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=265,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("experts") / "theirs"
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    Tokenizer([]).save(folder)
    return folder
