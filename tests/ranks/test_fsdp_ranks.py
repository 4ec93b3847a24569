"""Data parallelism of every kind against one rank."""

from __future__ import annotations

from typing import Any

import pytest
from meshes import MODELS, assert_same, job_of


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("world", "fields"),
    [
        (1, {}),
        (2, {}),
        (4, {"data_parallel_replicate_degree": 2}),
        (2, {"data_parallel_replicate_degree": 2}),
        (2, {"fsdp_reduce_last_only": True}),
    ],
    ids=["accumulation", "fsdp2", "hsdp", "ddp", "reduce last only"],
)
def test_same_as_one_rank(model: str, world: int, fields: dict[str, Any]) -> None:
    assert_same(job_of(model, **fields), model, world)
