"""Multi-token prediction on several ranks: loss of each depth, gradients and weights as on one rank."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import meshes
import pytest
from matrix import degrees, method, schedule
from meshes import EXPERTS, GRADIENT, LOSS, WEIGHT, job_of

from nanovl.config.schema import ActivationCheckpoint, Compile, Job, Model
from nanovl.verify import Outcome, compare, on_one_rank, outcome_on

BALANCED = {"scoring": "sigmoid", "load_balancing": "bias", "sequence_aux_loss_coef": 0.02}
MODELS = {
    "depth 2": meshes.MODELS["qwen3 mtp"],
    "nanochat, depth 2": meshes.MODELS["nanochat mtp"],
    "depth 2, before the norm, tied": Model(
        name="gemma3",
        flavor="debug",
        overrides={
            "num_hidden_layers": 4,
            "blocks": {"sliding": {"mixer": {"sliding_window": 8}}},
            "mtp": {"num_layers": 2, "hidden": "pre_norm", "block": "sliding"},
        },
    ),
    "experts": Model(
        name="qwen3_moe",
        flavor="debug",
        overrides={
            "num_hidden_layers": 4,
            "blocks": {"full": {"ffn": {**EXPERTS, **BALANCED}}},
            "mtp": {"num_layers": 1},
        },
    ),
    "latent, sparse, depth 2": Model(
        name="deepseek_v32",
        flavor="debug",
        overrides={
            "num_hidden_layers": 4,
            "blocks": {"moe": {"mixer": {"indexer": {"index_loss": "sparse"}}}},
            "mtp": {"num_layers": 2},
        },
    ),
}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp 2": degrees(shard=2),
    "tp 2": degrees(tp=2),
    "pp 2 1F1B": degrees(pp=2, **schedule("1F1B")),
    "pp 2 ZBVZeroBubble": degrees(pp=2, **schedule("ZBVZeroBubble")),
    "pp 2 InterleavedZeroBubble": degrees(pp=2, **schedule("InterleavedZeroBubble")),
    **{f"cp 2 {kind}": degrees(cp=2, **method(kind)) for kind in ("allgather", "ring", "ulysses")},
    "cp 2, tp 2": degrees(cp=2, tp=2),
    "pp 2, tp 2": degrees(pp=2, tp=2),
    "pp 2, cp 2, fsdp 2": degrees(pp=2, cp=2, shard=2),
    "ep 2": degrees(ep=2, shard=2),
    "ep 2, tp 2": degrees(ep=2, tp=2),
    "pp 2 ZBVZeroBubble, ep 2": degrees(pp=2, ep=2, shard=2, **schedule("ZBVZeroBubble")),
}
DENSE = [name for name, (_, fields) in MESHES.items() if fields["expert_parallel_degree"] == 1]
EVERY_DAY = [
    ("depth 2", "cp 2, tp 2"),
    ("depth 2", "pp 2 ZBVZeroBubble"),
    ("experts", "ep 2"),
    ("nanochat, depth 2", "cp 2, tp 2"),
    ("nanochat, depth 2", "pp 2 1F1B"),
]
EXHAUSTIVE = [
    *(("depth 2", mesh) for mesh in DENSE),
    *(("depth 2, before the norm, tied", mesh) for mesh in DENSE),
    *(("experts", mesh) for mesh in MESHES),
    *(("nanochat, depth 2", mesh) for mesh in DENSE),
    *(
        ("latent, sparse, depth 2", mesh)
        for mesh in ("tp 2", "cp 2 allgather", "ep 2", "pp 2 ZBVZeroBubble, ep 2")
    ),
]


def job(model: str, **parallelism: Any) -> Job:
    asked = job_of("qwen3", rows=8, local=1, **parallelism)
    # AdamW's first step divides a gradient by its own size: one that is all rounding (5e-9, in nanochat's embedding,
    # whose learning rate is 0.3) would move a weight by far more, but for an eps above it
    return replace(asked, model=MODELS[model], optimizer=replace(asked.optimizer, eps=1e-6))


@cache
def on_one(model: str) -> Outcome:
    return outcome_on(on_one_rank(job(model)), 1, 3)


def assert_same(asked: Job, model: str, world: int) -> None:
    expected, found = on_one(model), outcome_on(asked, world, 3)
    depths = 1 if model == "experts" else 2
    assert len(found.losses) == 3 * (1 + depths)
    assert found.initial == expected.initial
    far = compare(found, expected)
    assert far.loss < LOSS, far
    assert far.norm < GRADIENT, far
    assert far.gradient < GRADIENT, far
    assert far.weight < WEIGHT, far


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        *EVERY_DAY,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in EXHAUSTIVE if case not in EVERY_DAY),
    ],
)
def test_same_as_one_rank(model: str, mesh: str) -> None:
    world, fields = MESHES[mesh]
    assert_same(job(model, **fields), model, world)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["depth 2", "experts", "nanochat, depth 2"])
@pytest.mark.parametrize("mode", ["full", "op", "selective"])
def test_recomputed_modules_are_the_same(model: str, mode: Any) -> None:
    world, fields = MESHES["fsdp 2"]
    asked = replace(job(model, **fields), activation_checkpoint=ActivationCheckpoint(mode=mode))
    assert_same(asked, model, world)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["depth 2", "experts", "nanochat, depth 2"])
@pytest.mark.parametrize("mesh", ["fsdp 2", "tp 2", "pp 2 1F1B"])
def test_compiled_modules_are_the_same(model: str, mesh: str) -> None:
    world, fields = MESHES[mesh]
    asked = replace(job(model, **fields), compile=Compile(enable="on", backend="aot_eager"))
    assert_same(asked, model, world)


def test_the_router_of_a_module_is_balanced() -> None:
    """Its bias moves as those of the layers do, by what the whole job chose."""
    weights = on_one("experts").weights
    assert weights["mtp.4.block.ffn.router.expert_bias"].abs().max() > 0
