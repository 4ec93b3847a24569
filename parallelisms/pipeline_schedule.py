"""What every rank of a pipeline does in a step, in order: its micro-batches' forwards, backwards, sends and receives.

GPipe and 1F1B are a few lines; the tables of the other schedules are torch's. Transfers are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch.distributed.pipelining.schedules import get_schedule_class

from nanovl.config.schema import Parallelism
from nanovl.parallelisms.pipeline_split import ONE_STAGE, stages_of, stages_per_rank

Kind = Literal[
    "forward",
    "backward",
    "backward_input",
    "backward_weight",
    "send_stream",
    "receive_stream",
    "send_gradient",
    "receive_gradient",
]
"""`backward` is `backward_input`, on which the stage before waits, and `backward_weight`, on which nobody does."""
TORCH_KINDS: dict[str, Kind] = {
    "F": "forward",
    "B": "backward",
    "I": "backward_input",
    "W": "backward_weight",
}


class Action(NamedTuple):
    kind: Kind
    stage: int
    micro_batch: int


def actions(config: Parallelism, micro_batches: int, *, split_backward: bool) -> list[list[Action]]:
    """What each rank does, by rank. Without `split_backward` no schedule parts inputs' gradients from weights'."""
    ranks = config.pipeline_parallel_degree
    if config.pipeline_parallel_schedule in ONE_STAGE:
        orders = [_one_stage_order(config, rank, micro_batches) for rank in range(ranks)]
    else:
        orders = _torch_orders(config, micro_batches)
    if not split_backward:
        orders = [list(_whole_backwards(order)) for order in orders]
    stage_ranks = {stage: rank for rank in range(ranks) for stage in stages_of(rank, config)}
    return with_transfers(orders, stage_ranks)


def _one_stage_order(config: Parallelism, rank: int, micro_batches: int) -> list[Action]:
    """GPipe: all forwards, then all backwards; 1F1B: as many forwards ahead as there are ranks behind."""
    behind = config.pipeline_parallel_degree - 1 - rank
    ahead = micro_batches if config.pipeline_parallel_schedule == "GPipe" else min(behind, micro_batches)
    order = [Action("forward", rank, i) for i in range(ahead)]
    for i in range(micro_batches):
        if ahead + i < micro_batches:
            order.append(Action("forward", rank, ahead + i))
        order.append(Action("backward", rank, i))
    return order


def _torch_orders(config: Parallelism, micro_batches: int) -> list[list[Action]]:
    ranks, held = config.pipeline_parallel_degree, stages_per_rank(config)
    schedule: Callable[..., Any] = get_schedule_class(config.pipeline_parallel_schedule)
    # of its stages a schedule reads the numbers only, until it runs
    stages = [
        SimpleNamespace(num_stages=ranks * held, group_size=ranks, group_rank=0, submod=None)
        for _ in range(held)
    ]
    order = schedule(stages, micro_batches).pipeline_order
    return [[action for step in order[rank] for action in _of_torch(step)] for rank in range(ranks)]


def _of_torch(step: Any) -> Iterator[Action]:
    """Nothing for a bubble, two actions where DualPipeV would overlap them."""
    for action in () if step is None else step.sub_actions or (step,):
        yield Action(TORCH_KINDS[action.computation_type.value], action.stage_index, action.microbatch_index)


def _whole_backwards(order: Sequence[Action]) -> Iterator[Action]:
    for action in order:
        if action.kind == "backward_input":
            yield action._replace(kind="backward")
        elif action.kind != "backward_weight":
            yield action


def with_transfers(orders: Sequence[Sequence[Action]], stage_ranks: dict[int, int]) -> list[list[Action]]:
    """The orders with sends and receives between ranks.

    Ranks take turns, and a result enters the lists of both, sender and receiver, the moment it is there. So all
    ranks' transfers stand in one order, and no circle of ranks can wait for each other.
    """
    waiting = [list(reversed(order)) for order in orders]
    lowered: list[list[Action]] = [[] for _ in orders]
    done: set[Action] = set()
    while any(waiting):
        ready = [
            r for r, order in enumerate(waiting) if order and _is_ready(order[-1], len(stage_ranks), done)
        ]
        assert ready, f"no rank can go on: {[order[-1:] for order in waiting]}"
        for rank in ready:
            action = waiting[rank].pop()
            lowered[rank].append(action)
            done.add(action)
            transfer = _transfer(action)
            if transfer is None or transfer[1].stage not in stage_ranks:
                continue
            send, receive = transfer
            if stage_ranks[receive.stage] != rank:
                lowered[rank].append(send)
                lowered[stage_ranks[receive.stage]].append(receive)
    return lowered


def _is_ready(action: Action, stages: int, done: set[Action]) -> bool:
    kind, stage, i = action
    if kind == "forward":
        return stage == 0 or Action("forward", stage - 1, i) in done
    if kind == "backward_weight" or stage == stages - 1:
        return True
    return not done.isdisjoint({Action("backward", stage + 1, i), Action("backward_input", stage + 1, i)})


def _transfer(action: Action) -> tuple[Action, Action] | None:
    """Who sends and who receives what an action made."""
    kind, stage, i = action
    if kind == "forward":
        return Action("send_stream", stage, i), Action("receive_stream", stage + 1, i)
    if kind in ("backward", "backward_input"):
        return Action("send_gradient", stage, i), Action("receive_gradient", stage - 1, i)
    return None
