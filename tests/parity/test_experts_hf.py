"""Experts against transformers: Qwen3-MoE whole, DeepSeek-V3's router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from nanovl.config.schema import Model
from nanovl.models.blocks.moe import Moe, MoeConfig
from nanovl.registry import resolve_model

SIZES = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to ours; experts' gate and up are one tensor there."""
    ours = {}
    for name, value in theirs.items():
        name = name.removeprefix("model.")
        for old, new in (
            ("input_layernorm", "mixer_pre_norm"),
            ("post_attention_layernorm", "ffn_pre_norm"),
            ("self_attn", "mixer"),
            ("mlp.gate.", "ffn.router."),
            ("mlp.", "ffn."),
        ):
            name = name.replace(old, new)
        if name.endswith("gate_up_proj"):
            for half, part in zip(("gate_proj", "up_proj"), value.chunk(2, dim=1), strict=True):
                ours[name.replace("gate_up_proj", half)] = part
        else:
            ours[name] = value
    return ours


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_qwen3_moe_logits_and_gradients(norm_topk_prob: bool, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=131,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            norm_topk_prob=norm_topk_prob,
            max_position_embeddings=128,
            rope_theta=1e6,
            tie_word_embeddings=False,
            **SIZES,
        )
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    overrides: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "blocks": {
            "full": {
                "mixer": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
                "ffn": {**SIZES, "norm_topk_prob": norm_topk_prob},
            }
        },
    }
    spec = resolve_model(
        Model(name="qwen3_moe", flavor="debug", overrides={**overrides, "vocab_size": 131}), 131
    )
    ours = spec.family.model(spec.config)
    ours.load_state_dict(renamed(theirs.state_dict()))
    tokens = torch.randint(0, 131, (2, 40))
    expected, actual = theirs(tokens).logits, ours(tokens)
    assert (expected - actual).abs().max() <= 2e-5
    for logits in (expected, actual):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = renamed({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_deepseek_v3_chooses_and_weighs_the_same(norm_topk_prob: bool) -> None:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        hidden_size=24,
        moe_intermediate_size=20,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=norm_topk_prob,
    )
    theirs = DeepseekV3MoE(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(theirs.gate.e_score_correction_bias, std=0.2)
    ours = Moe(
        MoeConfig(
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=20,
            scoring="sigmoid",
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=2.5,
            n_group=4,
            topk_group=2,
            shared_expert_intermediate_size=40,
            load_balancing="bias",
        ),
        24,
    )
    names = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.expert_bias"}
    state = renamed(dict(theirs.state_dict()))
    ours.load_state_dict(
        {names.get(n, n.replace("shared_experts", "shared_expert")): v for n, v in state.items()}
    )
    x = torch.randn(2, 64, 24)
    _, weights, indices = theirs.gate(x)
    routing = ours.router(x)
    order, our_order = indices.argsort(-1), routing.experts_NA.argsort(-1)
    assert torch.equal(indices.gather(1, order), routing.experts_NA.gather(1, our_order))
    torch.testing.assert_close(
        routing.weights_NA.gather(1, our_order), weights.gather(1, order), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(ours(x), theirs(x))
