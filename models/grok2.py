"""Grok-2 (xAI, weights of August 2025).

Different from Llama: norms before and behind attention and MLP; every MLP is 2 of 8 experts beside one of twice their
width that every token takes, their sum over sqrt(2); all are gated by GELU; experts' weights are a softmax over all of
them, not over those chosen; scores of attention, router and vocabulary are softly capped; past 1024 tokens the capped
scores of attention grow with the logarithm of the query's place; embeddings times sqrt(hidden), logits times 1/2.

There is no class of transformers to compare with, and nothing is written in its format. Its files are read: experts are
cut by their width for 8 tensor ranks (w1, gate, and w3, up, in rows; w2, down, in columns), all else is whole. Names
and cuts are those of the code that reads them, sglang's grok.py and llama.cpp's converter; config.json is known from
copies; tests compare with a second implementation. Its tokenizer has a format of its own: a tokenizer.json has to be
put beside the weights.

Unverified, for want of the released files:
 - all of the above;
 - the rotation. Copies say rope_type = "original", which sglang computes without any stretching although scaling_factor
   = 16 and original_max_position_embeddings = 8192 stand beside it, and so does this; llama.cpp takes it for YaRN;
 - which GELU experts have. Here it is the one by tanh everywhere; sglang asks its kernel of experts for "gelu".
"""

from __future__ import annotations

import re
from functools import partial

from nanovl.config.config_json import ConfigJson
from nanovl.models.blocks.attention import AttentionConfig
from nanovl.models.blocks.moe import MoeConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig, adamw_groups
from nanovl.models.hf_keys import ATTENTION, GATED, decoder_rules, one_rule_an_expert
from nanovl.spec import HuggingFaceSpec, KeyGroup, KeyRule, ModelFamily


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


STRETCHING = (
    "original_max_position_embeddings",
    "scaling_factor",
    "extrapolation_factor",
    "attn_factor",
    "beta_fast",
    "beta_slow",
)
"""Of a rotation that is not stretched, see above."""


def config_from_hf(hf: ConfigJson) -> DecoderConfig:
    """The config of a config.json."""
    hf.ignore(*STRETCHING)
    hf.expect(
        embedding_multiplier_scale=hf["hidden_size"] ** 0.5,
        output_multiplier_scale=0.5,
        attn_logit_softcapping=30.0,
        router_logit_softcapping=30.0,
        final_logit_softcapping=50.0,
        residual_moe=True,
        rope_type="original",
        sliding_window_size=-1,
        global_attn_every_n=1,
    )
    return grok2(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        ffn=hf["intermediate_size"],
        expert_ffn=hf["moe_intermediate_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        experts=hf["num_local_experts"],
        active=hf["num_experts_per_tok"],
        vocab=hf["vocab_size"],
        theta=hf["rope_theta"],
        temperature_len=hf["attn_temperature_len"],
        eps=hf["rms_norm_eps"],
        context=hf["max_position_embeddings"],
    )


LAYER = {
    **ATTENTION,
    "block_sparse_moe.gate.weight": "ffn.router.weight",
    **{f"mlp.{name}.weight": f"ffn.shared_expert.{name}.weight" for name in GATED},
}
NORMS = {
    "pre_attn_norm": "mixer_pre_norm",
    "post_attn_norm": "mixer_post_norm",
    "pre_moe_norm": "ffn_pre_norm",
    "post_moe_norm": "ffn_post_norm",
}


def key_rules(config: DecoderConfig) -> list[KeyRule | KeyGroup]:
    """The key map."""
    ffn = config.blocks["full"].ffn
    assert isinstance(ffn, MoeConfig)
    return [
        *decoder_rules(config, LAYER, NORMS),
        *one_rule_an_expert(ffn.num_experts, "block_sparse_moe.experts", ("w1", "w3", "w2")),
    ]


def cut_dim(name: str) -> int | None:
    """The dimension in which the files of 8 tensor ranks hold slices of tensor `name`."""
    match = re.fullmatch(r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.(w[123])\.weight", name)
    return {"w1": 0, "w2": 1, "w3": 0}[match[1]] if match else None


FAMILY = ModelFamily(
    name="grok2",
    summary="Grok-2: 2 of 8 experts beside a shared MLP, capped scores that grow with the context, sandwich norms",
    config=DecoderConfig,
    flavors=FLAVORS,
    model=Decoder,
    optimizer_groups=adamw_groups,
    hf=HuggingFaceSpec("Grok1ForCausalLM", "git", config_from_hf, None, key_rules, cut_dim=cut_dim),
)
