"""The trainer's own model, sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from nanovl.config.schema import Job, Parallelism
from nanovl.dist import fork_ranks
from nanovl.inference.borrow import same_everywhere
from nanovl.inference.engine import Engine
from nanovl.mesh import build_mesh
from nanovl.parallelisms.fsdp import apply_fsdp

BuildModel = Callable[..., nn.Module]
SETTINGS: dict[str, Any] = {"max_tokens": 10, "temperature": 1.0, "seed": 1}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15]]


def sharded(rank: int, model: nn.Module) -> dict[str, Any]:
    parallelism = Parallelism(data_parallel_replicate_degree=2, fsdp_reshard_after_forward="always")
    mesh = build_mesh(parallelism, 4, torch.device("cpu"))
    apply_fsdp(model, Job(parallelism=parallelism), mesh, torch.float32)
    with torch.no_grad():
        model(torch.tensor([[1]]))  # leaves the root's weights gathered
    engine = Engine(model, max_rows=2)
    completions = engine.generate(PROMPTS, **SETTINGS)
    kept_sharded = all(isinstance(p, DTensor) for p in model.parameters())
    ids = torch.tensor([rank, 10 * rank])
    same_everywhere(ids, mesh.fsdp)
    if rank > 0:  # rounding that differs must not part the ranks: here it differs by far
        model.lm_head.register_forward_hook(lambda module, args, logits: logits.roll(rank, dims=-1))
    apart = engine.generate(PROMPTS, **SETTINGS)
    model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()
    return {
        "ids": [c.ids for c in completions],
        "apart": [c.ids for c in apart],
        "kept_sharded": kept_sharded,
        "agreed": ids.tolist(),
        "trained": all(p.grad is not None for p in model.parameters()),
        "size": dist.get_world_size(),
    }


def test_sharded_ranks_give_the_tokens_of_one_process(build_model: BuildModel) -> None:
    model = build_model("nanochat")
    expected = [c.ids for c in Engine(model).generate(PROMPTS, **SETTINGS)]
    for found in fork_ranks(sharded, 4, model):
        assert found["size"] == 4
        assert found["ids"] == expected
        assert found["apart"] == expected
        assert found["kept_sharded"]
        assert found["agreed"] == [0, 0]
        assert found["trained"]
