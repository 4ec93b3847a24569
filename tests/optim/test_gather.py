"""Matrices travel to one owner each and come back where they were, for every way a mesh can cut them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nanovl.dist import RankFailed, fork_ranks
from nanovl.optim.gather import Layout, chunk_sizes, on_whole_matrices, share_sizes


def test_chunks_are_equal_until_none_are_left() -> None:
    assert chunk_sizes(10, 4) == [3, 3, 3, 1]
    assert chunk_sizes(5, 4) == [2, 2, 1, 0]
    assert chunk_sizes(1, 3) == [1, 0, 0]
    assert chunk_sizes(8, 2) == [4, 4]


def test_shares_rotate_what_is_left_over() -> None:
    assert share_sizes(6, 4, turn=0) == [2, 2, 1, 1]
    assert share_sizes(6, 4, turn=3) == [2, 1, 1, 2]
    assert share_sizes(2, 4, turn=5) == [0, 1, 1, 0]
    assert share_sizes(8, 4, turn=1) == [2, 2, 2, 2]


def test_a_layout_without_a_dimension_is_replicated_where_it_was_cut() -> None:
    layout = Layout(torch.Size((4, 6)), None, (Replicate(), Shard(0)))
    assert layout.without(-1) == Layout(torch.Size((4, 1)), None, (Replicate(), Shard(0)))
    assert layout.without(-2) == Layout(torch.Size((1, 6)), None, (Replicate(), Replicate()))


def test_a_plain_tensor_is_its_own_whole() -> None:
    values, layout = torch.arange(24.0).reshape(2, 3, 4), Layout(torch.Size((3, 4)))
    out, side = on_whole_matrices(lambda x, s: (x * 2, s), values, None, layout, layout)
    assert torch.equal(out, values * 2)
    assert side is None


SHAPES = ((8, 6), (6, 8), (10, 4), (3, 5), (1, 7), (7, 1), (5, 4, 6), (2, 9, 5))


def _cases(meshes: dict[str, DeviceMesh]) -> list[tuple[str, DeviceMesh, tuple[Any, ...]]]:
    one, two = meshes["one"], meshes["two"]
    return [
        ("rows", one, (Shard(-2),)),
        ("first", one, (Shard(0),)),
        ("columns", one, (Shard(-1),)),
        ("replicas", one, (Replicate(),)),
        ("hsdp", two, (Replicate(), Shard(-2))),
        ("rows and columns", two, (Shard(-2), Shard(-1))),
        ("rows twice", two, (Shard(-2), Shard(-2))),
        ("strided rows", two, (_StridedShard(-2, split_factor=2), Shard(-2))),
        ("experts and rows", two, (Shard(0), Shard(-2))),
    ]


def _scale_by_sum(x: Tensor, side: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Needs the whole matrix, and tells every element and every side value apart."""
    assert side is not None
    total = x.sum(dim=(-2, -1), keepdim=True)
    return x * total + side, side + total


def _round_trip(rank: int) -> dict[str, int]:
    """Checks every case on this rank; returns how many matrices it worked on in each."""
    meshes = {"one": init_device_mesh("cpu", (4,)), "two": init_device_mesh("cpu", (2, 2))}
    worked: dict[str, int] = {}
    for name, mesh, raw in _cases(meshes):
        for shape in SHAPES:
            layout = Layout(torch.Size(shape), mesh, tuple(_positive(p, len(shape)) for p in raw))
            side_layout = layout.without(-1 if shape[-2] >= shape[-1] else -2)
            generator = torch.Generator().manual_seed(0)
            whole = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
            whole_side = torch.randn(3, *side_layout.shape, dtype=torch.float64, generator=generator)
            expected, expected_side = _scale_by_sum(whole, whole_side)
            seen = []

            def function(x: Tensor, side: Tensor | None, seen: list[int] = seen) -> Any:
                seen.append(len(x))
                return _scale_by_sum(x, side)

            values = torch.stack([layout.shard(matrix) for matrix in whole])
            sides = torch.stack([side_layout.shard(side) for side in whole_side])
            out, new_sides = on_whole_matrices(function, values, sides, layout, side_layout, turn=2)
            assert new_sides is not None
            assert expected_side is not None
            shards = torch.stack([layout.shard(e) for e in expected])
            side_shards = torch.stack([side_layout.shard(e) for e in expected_side])
            torch.testing.assert_close(out, shards, msg=f"{name} {shape}")
            torch.testing.assert_close(new_sides, side_shards, msg=f"{name} {shape}")
            worked[f"{name} {shape}"] = sum(seen)
    return worked


def _positive(placement: Any, ndim: int) -> Any:
    if isinstance(placement, Replicate):
        return placement
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim % ndim, split_factor=placement.split_factor)
    return Shard(placement.dim % ndim)


def test_every_cut_comes_back_and_rows_are_shared_out() -> None:
    ranks = fork_ranks(_round_trip, 4)
    for shape in ((8, 6), (3, 5), (1, 7)):
        # 3 matrices on 4 ranks: none twice; on 2 replicas of 2: shared out within each; else all on each rank
        assert sorted(rank[f"rows {shape}"] for rank in ranks) == [0, 1, 1, 1]
        assert sorted(rank[f"hsdp {shape}"] for rank in ranks) == [1, 1, 2, 2]
        assert [rank[f"strided rows {shape}"] for rank in ranks] == [3, 3, 3, 3]
    # experts sharded by expert stay on the ranks that hold them
    assert [rank["first (5, 4, 6)"] for rank in ranks] == [6, 6, 3, 0]
    # 3 parameters of 5 experts: 9 matrices on the first two ranks, 6 on the others, each pair halving its own
    assert [rank["experts and rows (5, 4, 6)"] for rank in ranks] == [5, 4, 3, 3]


def test_another_split_than_torchs_is_a_bug() -> None:
    with pytest.raises(RankFailed, match="not Shard's 2"):
        fork_ranks(_wrong_rows, 2)


def _wrong_rows(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    layout = Layout(torch.Size((4, 3)), mesh, (Shard(0),))
    on_whole_matrices(lambda x, s: (x, s), torch.zeros(1, 3, 3), None, layout, layout)
