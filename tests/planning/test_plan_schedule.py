"""Orders of pipelines whose bubbles are known."""

from __future__ import annotations

import pytest

from nanovl.config.schema import Parallelism
from nanovl.parallelisms.pipeline_schedule import Action, actions
from nanovl.planning.schedule import most_alive, simulate


def orders(schedule: str, ranks: int, micro_batches: int, *, split: bool = True) -> list[list[Action]]:
    config = Parallelism(pipeline_parallel_degree=ranks, pipeline_parallel_schedule=schedule)  # type: ignore[arg-type]
    return actions(config, micro_batches, split_backward=split)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_bubble_of_one_stage_a_rank(schedule: str) -> None:
    """(p - 1) / (m + p - 1), whatever the order."""
    assert simulate(orders(schedule, 4, 8), [1.0] * 4).bubble == pytest.approx(3 / 11)


def test_bubble_of_two_stages_a_rank() -> None:
    """Interleaving divides it by the stages of a rank: (p - 1) / (v m + p - 1)."""
    found = simulate(orders("Interleaved1F1B", 4, 8), [1.0] * 8)
    assert found.bubble == pytest.approx(3 / 19)
    assert found.longest == pytest.approx(3 * 19)


def test_split_backward_fills_the_bubble() -> None:
    whole, parted = (orders("ZBVZeroBubble", 4, 8, split=split) for split in (False, True))
    assert simulate(parted, [1.0] * 8).bubble < 0.5 * simulate(whole, [1.0] * 8).bubble


def test_longest_stage_and_recomputation_set_the_pace() -> None:
    """Each of 2 ranks: 2 micro-batches; the second stage works 3 + 1 times as long as it would forward."""
    found = simulate(orders("1F1B", 2, 2), [1.0, 2.0], [0.0, 2.0])
    assert found.longest == 1.0 + 2 * (2.0 + 4.0 + 2.0) + 2.0
    assert found.bubble == pytest.approx(1 - (2 * 3 + 2 * 8) / (2 * 19.0))


def test_most_alive_at_a_time() -> None:
    first, *_, last = orders("1F1B", 4, 8)
    assert most_alive(first, {0: 5}) == 4 * 5
    assert most_alive(last, {3: 5}) == 5
    assert most_alive(orders("GPipe", 4, 8)[0], {0: 5}) == 8 * 5


def test_parted_backward_keeps_until_its_second_half() -> None:
    order = [
        Action("forward", 0, 0),
        Action("backward_input", 0, 0),
        Action("forward", 0, 1),
        Action("backward_weight", 0, 0),
        Action("backward_input", 0, 1),
        Action("backward_weight", 0, 1),
    ]
    assert most_alive(order, {0: 1}) == 2
