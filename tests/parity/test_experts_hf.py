"""DeepSeek-V3's router and experts against transformers; families with experts are in test_moe_families_hf.py."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from nanovl.models.blocks.moe import Moe, MoeConfig


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to ours; experts' gate and up are one tensor there."""
    gate_up = theirs.pop("experts.gate_up_proj").chunk(2, dim=1)
    halves = zip(("experts.gate_proj", "experts.up_proj"), gate_up, strict=True)
    names = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.expert_bias"}
    return {names.get(n, n.replace("shared_experts", "shared_expert")): v for n, v in theirs.items()} | dict(
        halves
    )


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
    ours.load_state_dict(renamed(dict(theirs.state_dict())))
    x = torch.randn(2, 64, 24)
    _, weights, indices = theirs.gate(x)
    routing = ours.router(x)
    order, our_order = indices.argsort(-1), routing.experts_NA.argsort(-1)
    assert torch.equal(indices.gather(1, order), routing.experts_NA.gather(1, our_order))
    torch.testing.assert_close(
        routing.weights_NA.gather(1, our_order), weights.gather(1, order), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(ours(x), theirs(x))
