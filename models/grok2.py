"""Grok-2 (xAI, weights of August 2025).

Different from Llama: norms before and behind attention and MLP; every MLP is 2 of 8 experts beside one of twice their
width that every token takes, their sum over sqrt(2); all are gated by GELU; experts' weights are a softmax over all of
them, not over those chosen; scores of attention, router and vocabulary are softly capped; past 1024 tokens the capped
scores of attention grow with the logarithm of the query's place; embeddings times sqrt(hidden), logits times 1/2.

There is no class of transformers to compare with, and its files are cut for 8 tensor ranks, the same names in several
of them. So there is no key map: they are refused, and nothing is written in their format. What is known comes from the
code that serves it (sglang's grok.py) and from copies of its config.json; tests compare with a second implementation of
that.

Unverified, for want of the released files:
 - the rotation. Copies say rope_type = "original", which sglang computes without any stretching although scaling_factor
   = 16 and original_max_position_embeddings = 8192 stand beside it;
 - which GELU experts have. Here it is the one by tanh everywhere; sglang asks its kernel of experts for "gelu".
"""

from __future__ import annotations

from functools import partial

from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.spec import ModelFamily


def grok2(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    expert_ffn: int,
    heads: int,
    kv_heads: int = 8,
    head_dim: int = 128,
    experts: int = 8,
    active: int = 2,
    vocab: int = 131072,
    theta: float = 208_533_496.0,
    temperature_len: int = 1024,
    eps: float = 1e-5,
    context: int = 131072,
) -> DecoderConfig:
    """A Grok-2 of any size; `ffn` is the width of the MLP that every token takes."""
    mixer = AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=RopeConfig(theta=theta),  # unverified, see above
        attn_logit_softcapping=30.0,
        attn_temperature_len=temperature_len,
    )
    moe = MoeConfig(
        num_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=expert_ffn,
        activation="gelu_tanh",  # unverified, see above
        norm_topk_prob=False,
        router_logit_softcapping=30.0,
        shared_expert_intermediate_size=ffn,
        output_scale=0.5**0.5,
    )
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        blocks={"full": BlockConfig(mixer=mixer, ffn=moe, norm_placement="sandwich")},
        pattern=["full"],
        norm=NormConfig(eps=eps),
        embed_scale="sqrt_hidden_size",
        logit_scale=0.5,
        final_logit_softcapping=50.0,
        max_position_embeddings=context,
    )


# sizes of copies of its config.json; they come to the published number of parameters
FLAVORS = {
    "270b-a115b": partial(grok2, layers=64, hidden=8192, ffn=32768, expert_ffn=16384, heads=64),
    "debug": partial(
        grok2,
        layers=4,
        hidden=64,
        ffn=64,
        expert_ffn=32,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=512,
        theta=10_000.0,
        temperature_len=16,
        context=128,
    ),
}


FAMILY = ModelFamily(
    name="grok2",
    summary="Grok-2: 2 of 8 experts beside a shared MLP, capped scores that grow with the context, sandwich norms",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
)
