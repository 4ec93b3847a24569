"""Small jobs for every mesh, and the question asked of each: is it the same as on one rank?"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from nanovl.config.schema import (
    Job,
    LrSchedule,
    Model,
    Muon,
    Optimizer,
    OptimizerGroup,
    Parallelism,
    Tokenizer,
    Training,
)
from nanovl.verify import Difference, Outcome, compare, on_one_rank, outcome_on

VOCAB = 96
MODELS: dict[str, Model] = {
    "qwen3": Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": 4}),
    "qwen3 tied": Model(
        name="qwen3", flavor="debug", overrides={"num_hidden_layers": 4, "tie_word_embeddings": True}
    ),
    "qwen3 mtp": Model(
        name="qwen3", flavor="debug", overrides={"num_hidden_layers": 4, "mtp": {"num_layers": 2}}
    ),
    "nanochat": Model(
        name="nanochat",
        overrides={
            "depth": 4,
            "aspect_ratio": 16,
            "head_dim": 16,
            "max_position_embeddings": 32,
            "short_window_multiple": 8,
        },
    ),
}
MODELS["nanochat mtp"] = replace(
    MODELS["nanochat"], overrides={**MODELS["nanochat"].overrides, "mtp": {"num_layers": 2}}
)
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS_WITH_EXPERTS: dict[str, Model] = {
    "moe": Model(
        name="qwen3_moe",
        flavor="debug",
        overrides={
            "num_hidden_layers": 4,
            "blocks": {"full": {"ffn": {**EXPERTS, "aux_loss_coef": 0.02, "z_loss_coef": 0.001}}},
        },
    ),
    "moe sigmoid": Model(
        name="qwen3_moe",
        flavor="debug",
        overrides={
            "num_hidden_layers": 4,
            "prefix": ["dense"],
            "blocks": {
                "dense": {
                    "mixer": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
                    "ffn": {"intermediate_size": 48},
                },
                "full": {
                    "ffn": {
                        **EXPERTS,
                        "scoring": "sigmoid",
                        "routed_scaling_factor": 2.5,
                        "n_group": 4,
                        "topk_group": 2,
                        "shared_expert_intermediate_size": 24,
                        "shared_expert_gate": True,
                        "load_balancing": "bias",
                        "sequence_aux_loss_coef": 0.02,
                    }
                },
            },
        },
    ),
    # latent attention, YaRN, a dense layer before the experts, groups, biases, a shared expert
    "deepseek_v3": Model(name="deepseek_v3", flavor="debug"),
}
# biased experts, sinks, windows below a row's length
MODELS_WITH_EXPERTS["gpt_oss"] = Model(
    name="gpt_oss", flavor="debug", overrides={"blocks": {"sliding": {"mixer": {"sliding_window": 8}}}}
)
# a shared expert in parallel, caps, scores that grow with the place; of 8 experts, one token's second and third are so
# near in the fourth step that rounding decides
MODELS_WITH_EXPERTS["grok2"] = Model(
    name="grok2",
    flavor="debug",
    overrides={"blocks": {"full": {"mixer": {"attn_temperature_len": 4}, "ffn": {"num_experts": 4}}}},
)
MODELS |= MODELS_WITH_EXPERTS
MODELS["qwen3 muon"] = MODELS["qwen3"]
GROUPS = {
    "qwen3 muon": [
        OptimizerGroup(match=r"layers\..*_proj\.weight", kind="muon", lr=0.01),
        OptimizerGroup(match=r".*"),
    ]
}
"""Optimizer groups where they are not the family's own."""
MODELS |= {
    # window below a row's length; heads that 4 ranks share
    "olmo3": Model(
        name="olmo3",
        flavor="debug",
        overrides={"blocks": {"sliding": {"mixer": {"sliding_window": 8, "num_key_value_heads": 2}}}},
    ),
    "gemma3": Model(
        name="gemma3", flavor="debug", overrides={"blocks": {"sliding": {"mixer": {"sliding_window": 8}}}}
    ),
    # values narrower than queries and keys
    "mla": Model(
        name="llama3",
        flavor="debug",
        overrides={
            "num_hidden_layers": 2,
            "blocks": {
                "full": {
                    "mixer": {
                        "kind": "mla",
                        "num_attention_heads": 4,
                        "q_lora_rank": 24,
                        "kv_lora_rank": 16,
                        "qk_nope_head_dim": 16,
                        "qk_rope_head_dim": 8,
                        "v_head_dim": 20,
                    }
                }
            },
        },
    ),
    "sinks": Model(
        name="smollm3",
        flavor="debug",
        overrides={
            "blocks": {
                "rope": {
                    "mixer": {
                        "sinks": True,
                        "o_bias": True,
                        "attn_logit_softcapping": 3.0,
                        "query_pre_attn_scalar": 4,
                    },
                    "ffn": {"bias": True},
                }
            }
        },
    ),
}
LOSS, GRADIENT, WEIGHT = 1e-5, 1e-4, 1e-4
"""Largest relative differences allowed, in float32."""


def job_of(model: str, *, rows: int = 8, local: int = 2, seq_len: int = 32, **parallelism: Any) -> Job:
    """8 rows of 32 tokens; gradients are clipped; each family brings its own optimizer groups."""
    return Job(
        model=MODELS[model],
        tokenizer=Tokenizer(vocab_size=VOCAB),
        training=Training(
            seq_len=seq_len,
            global_batch_size=rows,
            local_batch_size=local,
            max_norm=0.5,
            mixed_precision_param="float32",
        ),
        # the cautious decay asks for signs: where an update is nearly 0, its last bit switches a whole decay
        optimizer=Optimizer(lr=1e-3, muon=Muon(cautious_weight_decay=False), groups=GROUPS.get(model, [])),
        lr_schedule=LrSchedule(kind="constant", warmup_steps=0),
        parallelism=Parallelism(**parallelism),
    )


@cache
def on_one(model: str, rows: int, seq_len: int, steps: int) -> Outcome:
    return outcome_on(on_one_rank(job_of(model, rows=rows, seq_len=seq_len)), 1, steps)


def difference(job: Job, model: str, world: int, steps: int = 5) -> Difference:
    """How far `job` on `world` ranks is from one rank; initial weights must be equal bit for bit."""
    expected = on_one(model, job.training.global_batch_size, job.training.seq_len, steps)
    found = outcome_on(job, world, steps)
    assert found.initial == expected.initial
    return compare(found, expected)


def assert_same(job: Job, model: str, world: int, steps: int = 5) -> None:
    far = difference(job, model, world, steps)
    assert far.loss < LOSS, far
    assert far.norm < GRADIENT, far
    assert far.gradient < GRADIENT, far
    assert far.weight < WEIGHT, far
