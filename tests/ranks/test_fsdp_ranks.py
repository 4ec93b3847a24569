"""Data parallelism of every kind against one rank."""

from __future__ import annotations

from typing import Any

import pytest
from meshes import MODELS, assert_same, job_of

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "accumulation": (1, {}),
    "fsdp2": (2, {}),
    "hsdp": (4, {"data_parallel_replicate_degree": 2}),
    "ddp": (2, {"data_parallel_replicate_degree": 2}),
    "reduce last only": (2, {"fsdp_reduce_last_only": True}),
}
COVERING = {"qwen3 tied", "nanochat", "moe sigmoid", "deepseek_v3"}
"""Models that the default run takes to every mesh; the others it takes to one."""


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        pytest.param(model, mesh, marks=[] if mesh == "fsdp2" or model in COVERING else pytest.mark.slow)
        for mesh in MESHES
        for model in MODELS
    ],
)
def test_same_as_one_rank(model: str, mesh: str) -> None:
    world, fields = MESHES[mesh]
    assert_same(job_of(model, **fields), model, world)
