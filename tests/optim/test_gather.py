"""Every matrix is whole on one rank of its team, once, and comes back where it was, for every way a mesh can cut it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from nanovl.dist import RankFailed, fork_ranks
from nanovl.optim.gather import Exchange, Groups, Layout, share_sizes


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
    (out,) = Exchange([layout], Groups())(lambda stacks: [stacks[0] * 2], [values])
    assert torch.equal(out, values * 2)


def _pieces_of_fsdp_over_tensor(rank: int, rows: int) -> Any:
    """What Layout says of a matrix that torch itself has cut, and what is really there."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = nn.Sequential(nn.Linear(3, rows, bias=False), nn.Linear(rows, 3, bias=False))
    whole = [torch.arange(3.0 * rows).view(p.shape) for p in model.parameters()]
    for parameter, full in zip(model.parameters(), whole, strict=True):
        parameter.data.copy_(full)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])
    boxes = []
    for parameter, full in zip(model.parameters(), whole, strict=True):
        assert isinstance(parameter, DTensor)
        box = Layout.of(parameter).piece(parameter.device_mesh.get_coordinate() or ())
        assert torch.equal(full[box], parameter.to_local()), (box, parameter.to_local())
        boxes.append([(part.start, part.stop) for part in box])
    return boxes


@pytest.mark.parametrize("rows", [7, 8])
def test_pieces_are_those_of_fsdp_over_tensor_parallel(rows: int) -> None:
    boxes = fork_ranks(_pieces_of_fsdp_over_tensor, 4, rows)
    if rows == 7:  # ranks (fsdp, tp) = (0, 0), (0, 1), (1, 0), (1, 1): rows 0-3 and 4-6 of tp, halved by fsdp
        assert [box[0] for box in boxes] == [[(a, b), (0, 3)] for a, b in ((0, 2), (4, 6), (2, 4), (6, 7))]
        assert [box[1] for box in boxes] == [
            [a, b] for a in ((0, 2), (2, 3)) for b in ((0, 4), (4, 7))
        ]  # rows by fsdp, columns by tp


Cut = tuple[str, tuple[int, ...], tuple[Any, ...]]
STRIDED = _StridedShard(0, split_factor=2)
MATRICES: list[Cut] = [
    ("fsdp", (4,), (Shard(0),)),
    ("columns", (4,), (Shard(1),)),
    ("replicas", (4,), (Replicate(),)),
    ("one of many axes", (1, 4, 1), (Shard(0), Shard(1), Replicate())),
    ("hsdp", (2, 2), (Replicate(), Shard(0))),
    ("fsdp, not in tp", (2, 2), (Shard(0), Replicate())),
    ("column parallel", (2, 2), (STRIDED, Shard(0))),
    ("row parallel", (2, 2), (Shard(0), Shard(1))),
    ("hsdp, row parallel", (2, 1, 2), (Replicate(), Shard(0), Shard(1))),
]
EXPERTS: list[Cut] = [
    ("ep", (4,), (Shard(0),)),
    ("ep, replicas", (2, 2), (Replicate(), Shard(0))),
    ("ep, efsdp of experts", (2, 2), (STRIDED, Shard(0))),
    ("ep, efsdp of rows", (2, 2), (Shard(1), Shard(0))),
    ("ep, etp of columns", (1, 2, 2), (STRIDED, Shard(0), Shard(2))),
    ("etp and efsdp of rows", (2, 1, 2), (_StridedShard(1, split_factor=2), Shard(0), Shard(1))),
]
CASES = [(cut, shape) for cut in MATRICES for shape in ((8, 6), (6, 8), (3, 5), (1, 7), (7, 1))]
CASES += [(cut, shape) for cut in EXPERTS for shape in ((5, 4, 6), (2, 9, 5), (4, 3, 3))]


def _mix(stacks: list[Tensor]) -> list[Tensor]:
    """Needs the whole matrix, and tells every element and every side value apart."""
    values, side = stacks
    total = values.sum(dim=(-2, -1), keepdim=True)
    return [values * total + side, side + total]


def _round_trips(rank: int) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """Checks every case on this rank; returns the sums of the matrices it worked on in each."""
    worked, groups = {}, Groups()
    for (name, sizes, placements), shape in CASES:
        mesh = init_device_mesh("cpu", sizes)
        layout = Layout(torch.Size(shape), mesh, placements)
        layouts = [layout, layout.without(-1 if shape[-2] >= shape[-1] else -2)]
        generator = torch.Generator().manual_seed(0)
        wholes = [torch.randn(3, *each.shape, dtype=torch.float64, generator=generator) for each in layouts]
        seen: list[Tensor] = []

        def function(stacks: list[Tensor], seen: list[Tensor] = seen) -> list[Tensor]:
            seen.append(stacks[0].sum(dim=(-2, -1)))
            return _mix(stacks)

        stacks = [_shards(whole, each) for whole, each in zip(wholes, layouts, strict=True)]
        found = Exchange(layouts, groups)(function, stacks, turn=2)
        for out, expected, each in zip(found, _mix(wholes), layouts, strict=True):
            torch.testing.assert_close(out, _shards(expected, each), msg=f"{name} {shape}")
        worked[name, shape] = torch.cat(seen)
    return worked


def _shards(whole: Tensor, layout: Layout) -> Tensor:
    assert isinstance(layout.mesh, DeviceMesh)
    here = layout.mesh.get_coordinate()
    assert here is not None
    return torch.stack([matrix[layout.piece(here)] for matrix in whole])


def test_every_cut_comes_back_and_nothing_is_computed_twice() -> None:
    ranks = fork_ranks(_round_trips, 4)
    for (name, _, _), shape in CASES:
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
        sums = torch.cat([worked[name, shape] for worked in ranks])
        expected = whole.sum(dim=(-2, -1)).flatten()
        torch.testing.assert_close(sums.sort().values, expected.sort().values, msg=f"{name} {shape}")
    count = lambda name, shape: [len(worked[name, shape]) for worked in ranks]  # noqa: E731
    for name, _, _ in MATRICES:  # 3 matrices on 4 ranks, from rank 2 on, on every mesh
        assert count(name, (8, 6)) == [1, 0, 1, 1], name
    # 3 parameters of 5 experts: those stay on the ranks that hold the experts, where they are whole
    assert count("ep", (5, 4, 6)) == [6, 6, 3, 0]
    # 9 matrices on each pair of replicas and 6 on the other
    assert count("ep, replicas", (5, 4, 6)) == [5, 3, 4, 3]
    assert count("ep, efsdp of rows", (5, 4, 6)) == [5, 3, 4, 3]


class Counting(Exchange):
    """Adds up the numbers that this rank sends to others."""

    sent = calls = 0

    def _all_to_all(self, sent: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        self.sent += sum(tensor.numel() for tensor in sent) - sent[self.place].numel()
        self.calls += 1
        return super()._all_to_all(sent, shapes)


def _traffic(rank: int) -> dict[str, int]:
    """What this rank sends for one 8 x 6 matrix a rank."""
    found = {}
    for name, sizes, placements in MATRICES:
        layout = Layout(torch.Size((8, 6)), init_device_mesh("cpu", sizes), placements)
        exchange = Counting([layout], Groups())
        exchange(lambda stacks: stacks, [_shards(torch.zeros(4, 8, 6), layout)])
        assert exchange.calls == 2
        found[name] = exchange.sent
    return found


def test_each_piece_travels_to_the_owner_once() -> None:
    ranks = fork_ranks(_traffic, 4)
    total = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
    assert total["fsdp"] == 2 * 4 * 48 * 3 // 4  # there and back, 3 of 4 quarters of each matrix
    assert total["row parallel"] == total["column parallel"] == total["fsdp"]
    # half of a matrix comes from the owner's copy; back go half of it to its mate and all of it to the other copy
    assert total["hsdp"] == 4 * (24 + 24 + 48)
    assert total["replicas"] == 4 * 3 * 48  # nothing is fetched


def _other_cut(rank: int) -> None:
    layout = Layout(torch.Size((4, 3)), init_device_mesh("cpu", (2,)), (Shard(0),))
    Exchange([layout], Groups())(lambda stacks: stacks, [torch.zeros(1, 3, 3)])


def test_another_cut_than_torchs_is_a_bug() -> None:
    with pytest.raises(RankFailed, match=r"holds \[\(3, 3\)\] of .*, not \[\(2, 3\)\]"):
        fork_ranks(_other_cut, 2)


def _one_stage_of_two(rank: int) -> list[int]:
    """Ranks 0 to 3 have matrices; rank 4, another stage, has none and goes on to make another group."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    found: list[int] = []
    if rank < 4:
        layout, groups = Layout(torch.Size((4, 4)), mesh, (Replicate(), Shard(0))), Groups()
        exchange = Exchange([layout], groups)
        assert Exchange([layout], groups).group is exchange.group
        (out,) = exchange(lambda s: [s[0] * 2], [_shards(torch.ones(2, 4, 4), layout)])
        assert torch.equal(out, torch.full((2, 2, 4), 2.0))
        assert exchange.group is not None
        found = torch.distributed.get_process_group_ranks(exchange.group)
    value = torch.ones(())
    torch.distributed.all_reduce(value, group=torch.distributed.new_group(list(range(5))))
    assert value == 5
    return found


def test_only_the_ranks_of_a_team_make_its_group() -> None:
    assert fork_ranks(_one_stage_of_two, 5, timeout_seconds=30) == [[0, 1, 2, 3]] * 4 + [[]]


def _as_distributed(rank: int) -> None:
    for (name, sizes, placements), shape in CASES:
        mesh, whole = init_device_mesh("cpu", sizes), torch.randn(shape)
        piece = Layout(whole.shape, mesh, placements).piece(mesh.get_coordinate() or ())
        local = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
        assert torch.equal(whole[piece], local), f"{name} {shape}"


def test_pieces_are_those_of_distribute_tensor() -> None:
    fork_ranks(_as_distributed, 4)
