"""Qwen3 with experts (arXiv:2505.09388).

Different from dense Qwen3: every layer's MLP is 128 experts, of which a token takes 8, chosen by softmax over all and
weighed by the chosen scores over their sum; no shared expert.
"""

from __future__ import annotations

from functools import partial

from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.decoder import Decoder, DecoderConfig, adamw_groups
from nanovl.models.qwen3 import qwen3
from nanovl.spec import ModelFamily


def qwen3_moe(
    *,
    layers: int,
    hidden: int,
    expert_ffn: int,
    heads: int,
    kv_heads: int = 4,
    head_dim: int = 128,
    experts: int = 128,
    active: int = 8,
    vocab: int = 151936,
    context: int = 40960,
) -> DecoderConfig:
    """A Qwen3 with experts, of any size."""
    config = qwen3(
        layers=layers,
        hidden=hidden,
        ffn=expert_ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=context,
    )
    config.blocks["full"].ffn = MoeConfig(
        num_experts=experts, num_experts_per_tok=active, moe_intermediate_size=expert_ffn
    )
    return config


# sizes of the released checkpoints' config.json
FLAVORS = {
    "30b-a3b": partial(qwen3_moe, layers=48, hidden=2048, expert_ffn=768, heads=32),
    "235b-a22b": partial(qwen3_moe, layers=94, hidden=4096, expert_ffn=1536, heads=64),
    "debug": partial(
        qwen3_moe,
        layers=4,
        hidden=64,
        expert_ffn=32,
        heads=8,
        head_dim=16,
        experts=8,
        active=2,
        vocab=512,
        context=128,
    ),
}


FAMILY = ModelFamily(
    name="qwen3_moe",
    summary="Qwen3 with experts: 8 of 128 a token, softmax router, no shared expert",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
)
