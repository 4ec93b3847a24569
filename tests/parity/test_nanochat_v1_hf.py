"""The first nanochat against transformers' NanoChatForCausalLM."""

from __future__ import annotations

import pytest
import torch
import transformers

from nanovl.config.schema import Model
from nanovl.registry import resolve_model


def swap_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotation by -angle, as nanochat does, is rotation by +angle of heads with swapped halves."""
    first, second = weight.view(-1, 2, head_dim // 2, weight.shape[1]).unbind(1)
    return torch.stack((second, first), dim=1).reshape(weight.shape)


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_transformers(seed: int) -> None:
    torch.manual_seed(seed)
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    mixer = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    overrides = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "blocks": {"full": {"mixer": mixer, "ffn": {"intermediate_size": 256}}},
    }
    spec = resolve_model(Model(name="nanochat_v1", overrides=overrides), 97)
    ours = spec.family.model(spec.config)
    state = {}
    for name, value in theirs.named_parameters():
        name = name.removeprefix("model.").replace("self_attn", "mixer").replace("mlp.fc1", "ffn.up_proj")
        name = name.replace("mlp.fc2", "ffn.down_proj")
        state[name] = swap_halves(value, 32) if name.endswith(("q_proj.weight", "k_proj.weight")) else value
    ours.load_state_dict(state)
    tokens = torch.randint(0, 97, (2, 30))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 2e-5
