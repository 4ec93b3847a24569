"""The gradients' norm and clipping on mixed meshes, against torchtitan's and against one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from nanovl.dist import fork_ranks
from nanovl.optim.gradients import clip_gradients, global_norm, nonfinite_gradients

STRIDED = _StridedShard(0, split_factor=2)
PARAMETERS: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = [
    ("dense", (8, 6), (STRIDED, Shard(0))),
    ("dense", (6, 10), (Shard(0), Shard(1))),
    ("dense", (7,), (Shard(0), Replicate())),
    ("dense", (4, 4), (Replicate(), Replicate())),
    ("sparse", (8, 3, 5), (STRIDED, Shard(0))),
    ("sparse", (2, 9, 5), (Shard(1), Shard(0))),
]


def gradient(i: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(i)) * (i + 1)


def whole_gradients() -> list[Tensor]:
    return [gradient(i, *shape) for i, (_, shape, _) in enumerate(PARAMETERS)]


def alone(max_norm: float) -> tuple[Tensor, list[Tensor]]:
    """Norm and clipped gradients of one process, by torch."""
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in whole_gradients()]
    for parameter, g in zip(parameters, whole_gradients(), strict=True):
        parameter.grad = g
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    return norm, [p.grad for p in parameters if p.grad is not None]


def cut(tensor: Tensor, mesh: DeviceMesh, placements: tuple[Any, ...]) -> DTensor:
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def on_meshes() -> list[nn.Parameter]:
    meshes = {
        "dense": init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp")),
        "sparse": init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep")),
    }
    parameters = []
    for (mesh, _, placements), g in zip(PARAMETERS, whole_gradients(), strict=True):
        parameter = nn.Parameter(cut(torch.zeros_like(g), meshes[mesh], placements))
        parameter.grad = cut(g, meshes[mesh], placements)
        parameters.append(parameter)
    return parameters


def _mixed_meshes(rank: int, max_norm: float) -> tuple[float, float, list[Tensor], list[Tensor]]:
    from torchtitan.distributed.utils import clip_grad_norm_

    theirs = on_meshes()
    their_norm = clip_grad_norm_(theirs, max_norm or float("inf"), foreach=True, ep_enabled=True)
    ours = on_meshes()
    norm = global_norm(ours, None)
    clip_gradients(ours, norm, max_norm)
    found: list[list[Tensor]] = [[p.grad.full_tensor() for p in each] for each in (ours, theirs)]  # type: ignore[union-attr]
    return norm.item(), their_norm.item(), *found


@pytest.mark.parametrize("max_norm", [0.0, 0.7, 1e6])
def test_mixed_meshes_clip_like_torchtitan_and_like_one_process(max_norm: float) -> None:
    expected, clipped = alone(max_norm)
    for norm, their_norm, ours, theirs in fork_ranks(_mixed_meshes, 4, max_norm):
        assert norm == pytest.approx(their_norm, rel=1e-6)
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        for found, titan, value in zip(ours, theirs, clipped, strict=True):
            torch.testing.assert_close(found, titan, rtol=1e-6, atol=0)
            torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    if max_norm == 0.7:
        left = sum(g.square().sum() for g in ours) ** 0.5
        assert left == pytest.approx(0.7, rel=1e-5)


def _stages(rank: int) -> tuple[float, float]:
    """Two stages of two ranks, each with every second parameter."""
    from torchtitan.distributed.utils import clip_grad_norm_

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    stage = mesh.get_local_rank("pp")
    sharded = [g for i, g in enumerate(whole_gradients()) if i % 2 == stage]
    parameters = [nn.Parameter(cut(torch.zeros_like(g), mesh["fsdp"], (Shard(0),))) for g in sharded]
    for parameter, g in zip(parameters, sharded, strict=True):
        parameter.grad = cut(g, mesh["fsdp"], (Shard(0),))
    norm = global_norm(parameters, mesh.get_group("pp")).item()
    return norm, clip_grad_norm_(parameters, 1.0, pp_mesh=mesh["pp"]).item()


def test_stages_add_up() -> None:
    expected = alone(0.0)[0].item()
    for norm, theirs in fork_ranks(_stages, 4):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert norm == pytest.approx(theirs, rel=1e-6)


def test_plain_parameters_and_none_at_all() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    assert global_norm([a, b], None) == 0
    clip_gradients([a, b], torch.tensor(0.0), 1.0)
    a.grad = torch.tensor([3.0, 4.0])
    norm = global_norm([a, b], None)
    assert norm == 5
    clip_gradients([a, b], norm, 0.0)
    assert a.grad.tolist() == [3, 4]
    clip_gradients([a, b], norm, 2.5)
    assert a.grad.tolist() == pytest.approx([1.5, 2.0], rel=1e-6)


def _nonfinite(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    named = {name: nn.Parameter(cut(torch.zeros(4, 2), mesh, (Shard(0),))) for name in "dcba"}
    for parameter in named.values():
        parameter.grad = cut(torch.zeros(4, 2), mesh, (Shard(0),))
    if rank == 1:
        local = named["c"].grad.to_local()  # type: ignore[union-attr]
        local[1, 0] = float("nan")
        named["e"] = nn.Parameter(torch.zeros(1))  # a parameter of another stage
        named["e"].grad = torch.tensor([float("inf")])
    if rank == 0:
        named["b"].grad.to_local()[0, 0] = float("-inf")  # type: ignore[union-attr]
        named["a"].grad = None
    return nonfinite_gradients(named.items())


def test_what_is_not_finite_on_some_rank_is_known_to_all() -> None:
    assert fork_ranks(_nonfinite, 2) == [["b", "c", "e"]] * 2


def test_what_is_not_finite_in_one_process() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([0.0, float("inf")]), torch.zeros(1)
    assert nonfinite_gradients([("a", a), ("b", b)]) == ["a"]
