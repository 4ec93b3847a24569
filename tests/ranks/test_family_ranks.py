"""Composed families with parts that others lack, on meshes: norms behind, windows, scaled embeddings, sinks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from meshes import assert_same, job_of

tp = partial(dict, tensor_parallel_degree=2)
cp = partial(dict, context_parallel_degree=2)
pp = partial(dict, pipeline_parallel_degree=2)
MESHES: list[tuple[str, int, dict[str, Any]]] = [
    ("olmo3", 2, tp()),
    ("gemma3", 2, tp()),
    ("sinks", 2, tp()),
    ("mla", 2, tp()),
    ("gpt_oss", 2, cp(context_parallel_method="ring")),
    ("mla", 2, cp()),
    ("mla", 2, cp(context_parallel_method="ring")),
    ("mla", 2, cp(context_parallel_method="ulysses")),
    ("mla", 4, {**tp(), **cp()}),
    ("sinks", 2, cp(context_parallel_method="ring")),
    ("olmo3", 4, tp(tensor_parallel_degree=4)),
    ("olmo3", 4, {**tp(), **cp()}),
    ("olmo3", 4, {**tp(), **pp()}),
    ("gemma3", 2, cp()),
    ("gemma3", 2, pp()),
    ("gemma3", 4, {**tp(), **cp(context_parallel_method="ulysses")}),
    ("sinks", 2, cp()),
    ("sinks", 2, cp(context_parallel_method="ulysses")),
    ("sinks", 2, pp()),
    ("sinks", 4, {"data_parallel_shard_degree": 4}),
    ("gpt_oss", 2, cp()),
    ("gpt_oss", 2, cp(context_parallel_method="ulysses")),
    ("gpt_oss", 2, pp()),
    ("grok2", 2, cp()),
    ("grok2", 2, pp()),
    ("grok2", 2, cp(context_parallel_method="ulysses")),
    ("grok2", 4, {**tp(), **cp(context_parallel_method="ring")}),
]


@pytest.mark.parametrize(
    ("model", "world", "mesh"),
    [pytest.param(*case, marks=[pytest.mark.slow] if i >= 5 else []) for i, case in enumerate(MESHES)],
    ids=lambda value: "-".join(f"{k[:4]}{v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_the_same_as_on_one_rank(model: str, world: int, mesh: dict[str, Any]) -> None:
    assert_same(job_of(model, **mesh), model, world)
