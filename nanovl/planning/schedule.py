"""A pipeline's order of work, without the work: what is alive at the same time, and who waits for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanovl.parallelisms.pipeline_schedule import Action

SHARES = {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
"""Work of an action relative to its stage's forward."""


class Busy(NamedTuple):
    """One step of a pipeline."""

    longest: float
    """From the first action to the end of the last."""
    bubble: float
    """Share of that time in which a rank waits, on average."""


def most_alive(order: Sequence[Action], kept: Mapping[int, int]) -> int:
    """Most that is alive at a time if each passage through stage s keeps `kept[s]`, from forward to last backward."""
    alive = most = 0
    parted = {(a.stage, a.micro_batch) for a in order if a.kind == "backward_weight"}
    for kind, stage, micro_batch in (action for action in order if action.kind in SHARES):
        if kind == "forward":
            alive += kept[stage]
        elif kind in ("backward", "backward_weight") or (
            kind == "backward_input" and (stage, micro_batch) not in parted
        ):
            alive -= kept[stage]
        most = max(most, alive)
    return most


def simulate(
    orders: Sequence[Sequence[Action]], forward: Sequence[float], again: Sequence[float] | None = None
) -> Busy:
    """Let ranks work through their orders, each action once what it needs is there; transfers take no time.

    `forward` = cost of each stage's, `again` = cost of what its backward recomputes.
    """
    again = [0.0] * len(forward) if again is None else again
    clocks, busy = [0.0] * len(orders), 0.0
    finished: dict[Action, float] = {}
    waiting = [[a for a in reversed(order) if a.kind in SHARES] for order in orders]
    while any(waiting):
        before = len(finished)
        for rank, order in enumerate(waiting):
            while order and (start := _start(order[-1], len(forward), finished)) is not None:
                action = order.pop()
                work = SHARES[action.kind] * forward[action.stage]
                work += again[action.stage] if action.kind in ("backward", "backward_input") else 0.0
                clocks[rank] = max(clocks[rank], start) + work
                busy += work
                finished[action] = clocks[rank]
        assert len(finished) > before, "the order waits for itself"
    longest = max(clocks)
    return Busy(longest, 1.0 - busy / (longest * len(orders)))


def _start(action: Action, stages: int, finished: Mapping[Action, float]) -> float | None:
    """When what `action` needs from other stages is there; None = not yet known."""
    kind, stage, i = action
    if kind == "backward_weight" or (kind == "forward" and stage == 0):
        return 0.0
    if kind == "forward":
        return finished.get(Action("forward", stage - 1, i))
    if stage == stages - 1:
        return finished.get(Action("forward", stage, i))
    ends = [finished[a] for k in ("backward", "backward_input") if (a := Action(k, stage + 1, i)) in finished]
    return ends[0] if ends else None
