"""Gated DeltaNet on several ranks: heads, layers, experts and rows apart equal one rank; the sequence cannot be cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from matrix import degrees
from meshes import GRADIENT, LOSS, WEIGHT, job_of

from nanovl.config.schema import ActivationCheckpoint, Job, Model, Parallelism
from nanovl.parallelisms.apply import parallelism_mistakes
from nanovl.registry import resolve_model
from nanovl.verify import Outcome, compare, on_one_rank, outcome_on

# the gated norm of an almost empty memory blows up rounding: a larger eps, less so
SMALL = {"num_hidden_layers": 4, "norm": {"eps": 1e-3}}
MODELS = {
    "dense": Model(name="qwen3_5", flavor="debug", overrides=SMALL),
    "experts": Model(name="qwen3_next", flavor="debug", overrides=SMALL),
}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2": degrees(tp=2),
    "tp 2, fsdp 2": degrees(tp=2, shard=2),
    "pp 2, ep 2": degrees(pp=2, ep=2, shard=2),
    "tp 4, two ranks a key head": degrees(tp=4),
    "ep 2, tp 2": degrees(ep=2, tp=2),
    "pp 2, tp 2": degrees(pp=2, tp=2),
    "hsdp 2 x 2": degrees(copies=2, shard=2),
}
CASES = {
    "dense": ("tp 2", "tp 2, fsdp 2", "pp 2, tp 2", "hsdp 2 x 2"),
    "experts": ("pp 2, ep 2", "tp 4, two ranks a key head", "ep 2, tp 2"),
}
EVERY_DAY = {"tp 2"}


def job(model: str, **parallelism: Any) -> Job:
    return replace(job_of("qwen3", rows=8, local=1, **parallelism), model=MODELS[model])


@cache
def on_one(model: str) -> Outcome:
    return outcome_on(on_one_rank(job(model)), 1, 3)


def assert_same(asked: Job, model: str, world: int) -> None:
    expected, found = on_one(model), outcome_on(asked, world, 3)
    assert found.initial == expected.initial
    far = compare(found, expected)
    assert far.loss < LOSS, far
    assert far.gradient < GRADIENT, far
    assert far.weight < WEIGHT, far


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        pytest.param(model, mesh, marks=[] if mesh in EVERY_DAY else [pytest.mark.slow])
        for model, meshes in CASES.items()
        for mesh in meshes
    ],
)
def test_same_as_one_rank(model: str, mesh: str) -> None:
    world, fields = MESHES[mesh]
    assert_same(job(model, **fields), model, world)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "op"])
def test_recomputed_layers_are_the_same(mode: Any) -> None:
    asked = replace(job("experts"), activation_checkpoint=ActivationCheckpoint(mode=mode))
    assert_same(asked, "experts", 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"context_parallel_degree": 2},
            "context_parallel_degree = 2: layers 0, 1, 2 mix tokens without an attention core",
        ),
        ({"tensor_parallel_degree": 3}, "mixer.v_conv, layers.*.mixer.A_log, layers.*.mixer.dt_bias"),
    ],
)
def test_what_cannot_be_cut_is_said(fields: dict[str, int], message: str) -> None:
    asked = Job(model=Model(name="qwen3_next", flavor="debug"), parallelism=Parallelism(**fields))
    with torch.device("meta"):
        spec = resolve_model(asked.model, 64)
        model = spec.family.model(spec.config)
    wrong = parallelism_mistakes(model, asked, 6, torch.device("cpu"))
    assert sum(message in line for line in wrong) == 1
