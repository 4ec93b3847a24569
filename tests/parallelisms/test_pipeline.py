"""Layers of stages, what cannot be split, every schedule's table, and a backward in two halves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nanovl.config.schema import Job, Model, Parallelism, Training
from nanovl.models.blocks.head import Head
from nanovl.parallelisms.pipeline_backward import backward_inputs
from nanovl.parallelisms.pipeline_schedule import Action, actions
from nanovl.parallelisms.pipeline_split import balanced, costs, mistakes, stages_of
from nanovl.registry import resolve_model
from nanovl.spec import Model as ModelPart

SCHEDULES: list[Any] = [
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


def model_of(layers: int, **overrides: Any) -> ModelPart:
    chosen = Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": layers, **overrides})
    spec = resolve_model(chosen, 512)
    with torch.device("meta"):
        return spec.family.model(spec.config)


def job_of(rows: int = 8, local: int = 1, **fields: Any) -> Job:
    return Job(
        training=Training(seq_len=64, global_batch_size=rows, local_batch_size=local),
        parallelism=Parallelism(**{"pipeline_parallel_degree": 2, **fields}),
    )


def test_stages_are_laid_out_in_loops_or_a_v() -> None:
    loop = Parallelism(pipeline_parallel_degree=3, pipeline_parallel_schedule="Interleaved1F1B")
    v = Parallelism(pipeline_parallel_degree=3, pipeline_parallel_schedule="ZBVZeroBubble")
    assert [stages_of(rank, loop) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [stages_of(rank, v) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert stages_of(1, Parallelism(pipeline_parallel_degree=3)) == [1]


def test_layers_are_balanced_with_the_head_counted() -> None:
    assert balanced([1.0] * 8, 4, head=0.0) == [2, 2, 2, 2]
    assert balanced([1.0] * 8, 2, head=2.0) == [5, 3]  # 5 and 3 + 2
    assert balanced([1.0] * 4, 4, head=9.0) == [1, 1, 1, 1]  # none is left empty
    assert balanced([5.0, 1.0, 1.0, 1.0], 2, head=0.0) == [1, 3]
    assert balanced([1.0] * 7, 3, head=0.0) == [2, 2, 3]


def test_costs_are_those_of_the_whole_model() -> None:
    model = model_of(3)
    *layers, head = costs(model, seq_len=64)
    assert head == 2 * 512 * 64  # two operations a weight of the head
    mean_keys = 65 / 2  # 1, 2, ... 64 keys
    assert sum(layers) + head == pytest.approx(model.forward_flops_per_token(lambda window: mean_keys))


def test_mean_keys_of_a_window() -> None:
    """Window 4 in a row of 8 tokens: 1, 2, 3 keys, then 4 five times."""
    found: list[float] = []

    def note(mean_keys: Any) -> float:
        found.append(mean_keys(4))
        return 0.0

    model = model_of(1)
    type(model).forward_flops_per_token, kept = (
        lambda _, mean_keys: note(mean_keys),
        type(model).forward_flops_per_token,
    )
    try:
        costs(model, seq_len=8)
    finally:
        type(model).forward_flops_per_token = kept  # type: ignore[method-assign]
    assert found[0] == (1 + 2 + 3 + 5 * 4) / 8


@pytest.mark.parametrize(
    ("fields", "job", "said"),
    [
        (
            {"pipeline_parallel_degree": 8},
            {},
            "parallelism.pipeline_parallel_degree = 8: the model's 4 layers are too few for 8 stages; use 4",
        ),
        (
            {"pipeline_parallel_degree": 4, "pipeline_parallel_schedule": "Interleaved1F1B"},
            {},
            "too few for 4 ranks x 2 stages = 8 stages; use 2, or a schedule with one stage a rank",
        ),
        (
            {"pipeline_parallel_layers": [3, 2]},
            {},
            "pipeline_parallel_layers = [3, 2]: adds up to 5, the model has 4 layers; use [2, 2], or leave it out",
        ),
        (
            {"pipeline_parallel_layers": [4]},
            {},
            "pipeline_parallel_layers = [4]: names 1 stages, there are 2 stages; use [2, 2], or leave it out",
        ),
        ({"pipeline_parallel_layers": [4, 0]}, {}, "every stage wants a layer; use [2, 2]"),
        (
            {"pipeline_parallel_stages_per_rank": 2},
            {},
            "stages_per_rank = 2: 1F1B keeps one stage on a rank; use 1, or pipeline_parallel_schedule",
        ),
        (
            {"pipeline_parallel_stages_per_rank": 1, "pipeline_parallel_schedule": "LoopedBFS"},
            {},
            "stages_per_rank = 1: LoopedBFS keeps two stages or more on a rank; use 2",
        ),
        (
            {"pipeline_parallel_stages_per_rank": 3, "pipeline_parallel_schedule": "DualPipeV"},
            {},
            "stages_per_rank = 3: DualPipeV keeps two stages on a rank; use 2",
        ),
        (
            {},
            {"local": 0},
            "training.local_batch_size = 0: all rows of a rank are one micro-batch, which keeps one stage of the "
            "pipeline busy at a time; use 4 or less",
        ),
        (
            {},
            {"local": 8},
            "global_batch_size = 8: 1 micro-batches of 1 x 8 rows, and 1F1B on 2 ranks wants 2 or more; use 16",
        ),
        (
            {"pipeline_parallel_schedule": "Interleaved1F1B"},
            {"rows": 7},
            "7 micro-batches of 1 x 1 rows, and Interleaved1F1B on 2 ranks goes through them in 3 rounds, which "
            "must be equal; use 6 or 8, or set training.local_batch_size",
        ),
        (
            {"pipeline_parallel_schedule": "DualPipeV"},
            {"rows": 3},
            "3 micro-batches of 1 x 1 rows, and DualPipeV on 2 ranks wants one for each of the 4 stages; use 4",
        ),
        (
            {"fsdp_reduce_last_only": False},
            {},
            "parallelism.fsdp_reduce_last_only = false: a pipeline sums gradients over data ranks once a step",
        ),
        (
            {"pipeline_parallel_degree": 1, "pipeline_parallel_layers": [4]},
            {},
            "pipeline_parallel_layers: there are no stages with pipeline_parallel_degree = 1; remove it",
        ),
    ],
)
def test_what_cannot_be_split_is_said(fields: dict[str, Any], job: dict[str, Any], said: str) -> None:
    job_ = job_of(**job, **fields)
    (line,) = mistakes(model_of(4), job_, job_.parallelism.pipeline_parallel_degree)
    assert said in line


def test_several_mistakes_are_said_at_once() -> None:
    found = mistakes(model_of(4), job_of(local=0, pipeline_parallel_layers=[3, 2]), 2)
    assert len(found) == 2


def test_sizes_that_are_not_known_yet_are_not_judged() -> None:
    assert mistakes(model_of(4), job_of(rows=0, local=2), 2) == []


def tables() -> Iterator[Any]:
    for schedule in SCHEDULES:
        for ranks, micro_batches in ((2, 2), (2, 4), (2, 6), (4, 8), (4, 16), (3, 7)):
            if schedule == "DualPipeV" and micro_batches < 2 * ranks:
                continue
            if schedule.startswith("Interleaved") and micro_batches % max(1, micro_batches // ranks):
                continue
            yield schedule, ranks, micro_batches


@pytest.mark.parametrize("split_backward", [True, False])
@pytest.mark.parametrize(("schedule", "ranks", "micro_batches"), tables())
def test_tables_are_complete_and_can_run(
    schedule: Any, ranks: int, micro_batches: int, split_backward: bool
) -> None:
    config = Parallelism(pipeline_parallel_degree=ranks, pipeline_parallel_schedule=schedule)
    table = actions(config, micro_batches, split_backward=split_backward)
    stage_ranks = {s: rank for rank in range(ranks) for s in stages_of(rank, config)}
    listed = [a for order in table for a in order]
    assert len(listed) == len(set(listed))
    for stage, rank in stage_ranks.items():
        for i in range(micro_batches):
            mine = [a.kind for a in table[rank] if a.stage == stage and a.micro_batch == i]
            assert mine.count("forward") == 1
            halves = [k for k in mine if k in ("backward_input", "backward_weight")]
            assert halves in ([], ["backward_input", "backward_weight"])
            assert mine.count("backward") == (0 if halves else 1)
            assert split_backward or not halves
    run_with_blocking_transfers(table, stage_ranks)


def run_with_blocking_transfers(table: list[list[Action]], stage_ranks: dict[int, int]) -> None:
    """Hardest case: a transfer happens only while both ranks stand at it, each with nothing else to do."""
    places = [0] * len(table)
    while any(place < len(order) for place, order in zip(places, table, strict=True)):
        moved = False
        for rank, order in enumerate(table):
            if places[rank] == len(order):
                continue
            action = order[places[rank]]
            if not action.kind.startswith(("send", "receive")):
                places[rank] += 1
                moved = True
            elif action.kind.startswith("send"):
                there = action.stage + (1 if action.kind == "send_stream" else -1)
                awaited = Action(action.kind.replace("send", "receive"), there, action.micro_batch)  # type: ignore[arg-type]
                peer = stage_ranks[there]
                if places[peer] < len(table[peer]) and table[peer][places[peer]] == awaited:
                    places[rank] += 1
                    places[peer] += 1
                    moved = True
        assert moved, [order[place] for place, order in zip(places, table, strict=True) if place < len(order)]


def test_1f1b_on_two_ranks_by_hand() -> None:
    config = Parallelism(pipeline_parallel_degree=2)
    first, second = actions(config, 3, split_backward=True)
    short = {"forward": "F", "backward": "B"}
    assert [f"{short[a.kind]}{a.micro_batch}" for a in first if a.kind in short] == [
        "F0", "F1", "B0", "F2", "B1", "B2",
    ]  # fmt: skip
    assert [f"{short[a.kind]}{a.micro_batch}" for a in second if a.kind in short] == [
        "F0", "B0", "F1", "B1", "F2", "B2",
    ]  # fmt: skip


class Twisted(nn.Module):
    """A weight used twice on the path, one beside it, a bias, a table, and an input that passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.beside = nn.Parameter(torch.randn(4))
        self.table = nn.Embedding(3, 4)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.twice(x)) * self.beside[:4]
        return self.twice(x) + self.table(index) * y, y.view_as(y)


def test_two_halves_of_a_backward_are_the_whole() -> None:
    torch.manual_seed(0)
    model = Twisted()
    x, y = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    index, upstream = torch.randint(0, 3, (5,)), (torch.randn(5, 4), torch.randn(5, 4))
    torch.autograd.backward(model(x, y, index), upstream)
    expected = {name: p.grad for name, p in model.named_parameters()}
    inputs = [x.grad, y.grad]
    model.zero_grad()
    gradients, later = backward_inputs(model(x, y, index), upstream, (x, y))
    assert all(p.grad is None for p in model.parameters())
    later.run()
    for found, wanted in zip(gradients, inputs, strict=True):
        assert found is not None
        torch.testing.assert_close(found, wanted)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_the_second_half_adds_to_what_is_there() -> None:
    linear, x = nn.Linear(3, 2, bias=False), torch.ones(1, 3, requires_grad=True)
    for _ in range(2):
        _, later = backward_inputs([linear(x).sum()], None, [x])
        later.run()
    assert linear.weight.grad is not None
    assert linear.weight.grad.tolist() == [[2.0] * 3] * 2


def test_the_loss_of_a_head_in_two_halves() -> None:
    """Its gradient is a function of its own (models/blocks/head.py), which both halves run."""
    torch.manual_seed(0)
    head, x = Head(8, 16), torch.randn(2, 3, 8, requires_grad=True)
    nn.init.normal_(head.weight)
    targets, weights = torch.randint(0, 16, (2, 3)), torch.rand(2, 3)
    expected = torch.autograd.grad(head.cross_entropy(x, targets, weights, 2)[0], (x, head.weight))
    gradients, later = backward_inputs([head.cross_entropy(x, targets, weights, 2)[0]], None, [x])
    later.run()
    assert gradients[0] is not None
    assert head.weight.grad is not None
    assert torch.equal(gradients[0], expected[0])
    assert torch.equal(head.weight.grad, expected[1])
