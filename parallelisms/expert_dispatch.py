"""Tokens on their way to experts on other ranks.

A rank sends each of its token copies to the rank that holds the expert, in an all-to-all of uneven sizes, and gets the
outputs back in the same places. Sizes are exchanged first; the host has to know them, which is the one wait of a layer.
The rows themselves travel while the caller computes: the layer's shared expert, and in backward its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovl.dist import all_reduce
from nanovl.parallelisms.collectives import gather, reduce_scatter

# N tokens, D model, A experts of a token, R token copies, E experts, L experts of one rank, W ranks that share experts

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Trip:
    """Where the rows of one layer go."""

    sizes_out: list[int]
    """Rows for each rank."""
    sizes_in: list[int]
    """Rows of each rank that come here."""
    by_expert_R: Tensor
    """Puts the rows that came, sorted by sender and then by expert, in the order of experts and then of senders."""
    by_sender_R: Tensor
    """The reverse."""
    counts_L: Tensor
    """Rows of each expert here."""


@dataclass
class Journey:
    """One all-to-all of rows, and of their gradients the other way."""

    sizes_out: list[int]
    sizes_in: list[int]
    ranks: dist.ProcessGroup
    returning: Tensor | None = None
    """Gradients on their way back: autograd would want them as many as the rows that came."""

    def start(self, x: Tensor) -> Tensor:
        """May be read after `arrived`."""
        return _start(x, self.sizes_out, self.sizes_in, self.ranks)

    def start_back(self, gradient: Tensor) -> None:
        self.returning = _start(gradient, self.sizes_in, self.sizes_out, self.ranks)

    def end_back(self) -> Tensor:
        assert self.returning is not None
        gradient, self.returning = arrived(self.returning), None
        return gradient


@dataclass(frozen=True)
class Travelling:
    """What `receive` and `give_back` need to know of what was sent."""

    at_home: Any
    """Of the layer's own dispatch, which sorted the tokens of this rank (or tensor group)."""
    rows_RD: Tensor
    """Those that come here; not to be read before they have arrived."""
    trip: Trip | None
    journey: Journey | None


class ExpertDispatch(nn.Module):
    """The layer's own dispatch, whose rows travel over `ranks`, between experts whose channels are cut over `cut`.

    Where channels are cut, all ranks of the tensor group work on the tokens of all: those are gathered first, and the
    ranks' partial outputs are added and cut again last.
    """

    def __init__(
        self, own: nn.Module, ranks: dist.ProcessGroup | None, cut: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.own: Any = own
        self.ranks, self.cut = ranks, cut
        self.plan = plan_trip  # `nanovl plan`, which has no tokens to count, puts another here

    def send(self, x_ND: Tensor, routing: Any) -> Travelling:
        """Start the journey."""
        if self.cut is not None:
            counts_E = all_reduce(routing.counts_E.clone(), group=self.cut)
            experts_NA, weights_NA = (gather(x, 0, self.cut) for x in routing[:2])
            x_ND, routing = gather(x_ND, 0, self.cut), type(routing)(experts_NA, weights_NA, counts_E)
        at_home = self.own.send(x_ND, routing)
        if self.ranks is None:
            return Travelling(at_home, at_home.rows_RD, None, None)
        trip = self.plan(at_home.counts_E, self.ranks)
        journey = Journey(trip.sizes_out, trip.sizes_in, self.ranks)
        return Travelling(at_home, _Depart.apply(at_home.rows_RD, journey), trip, journey)

    def receive(self, sent: Travelling) -> tuple[Tensor, Tensor]:
        """The rows for the experts here, grouped by expert, and how many belong to each."""
        trip = sent.trip
        if trip is None:
            return sent.rows_RD, sent.at_home.counts_E
        rows_RD = _Arrive.apply(sent.rows_RD, sent.journey)
        return rows_RD.index_select(0, trip.by_expert_R), trip.counts_L

    def give_back(self, out_RD: Tensor, sent: Travelling) -> Tensor:
        """The experts' outputs for this rank's tokens, weighted and added up, [N, D]."""
        trip = sent.trip
        if trip is not None and self.ranks is not None:
            journey = Journey(trip.sizes_in, trip.sizes_out, self.ranks)
            out_RD = _Depart.apply(out_RD.index_select(0, trip.by_sender_R), journey)
            out_RD = _Arrive.apply(out_RD, journey)
        out_ND: Tensor = self.own.give_back(out_RD, sent.at_home)
        return out_ND if self.cut is None else reduce_scatter(out_ND, 0, self.cut)


def plan_trip(
    counts_E: Tensor, ranks: dist.ProcessGroup, read: Callable[[Tensor], Any] = Tensor.tolist
) -> Trip:
    """Exchange how many rows each rank has for each expert. `read` brings sizes [out and in, ranks] to the host."""
    world = ranks.size()
    out_WL = counts_E.view(world, -1)
    in_WL = torch.empty_like(out_WL)
    dist.all_to_all_single(in_WL, out_WL.contiguous(), group=ranks)
    sizes = read(torch.stack((out_WL.sum(1), in_WL.sum(1))))  # the one wait for the device
    local = torch.arange(in_WL.shape[1], device=in_WL.device).repeat(world)
    expert_R = local.repeat_interleave(in_WL.flatten(), output_size=sum(sizes[1]))
    by_expert_R = expert_R.argsort(stable=True)
    by_sender_R = torch.empty_like(by_expert_R)
    by_sender_R[by_expert_R] = torch.arange(len(by_expert_R), device=by_expert_R.device)
    return Trip(sizes[0], sizes[1], by_expert_R, by_sender_R, in_WL.sum(0))


def _start(x: Tensor, sizes_out: list[int], sizes_in: list[int], ranks: dist.ProcessGroup) -> Tensor:
    # detached on both sides: a backend's thread may be the last to hold either, and must not take a graph down with it
    started: Tensor = _c10d.all_to_all_single(x.detach().contiguous(), sizes_in, sizes_out, ranks.group_name)
    return started.detach()


def arrived(x: Tensor) -> Tensor:
    """The result of a collective, once there: the stream waits, or the host of a CPU."""
    there: Tensor = _c10d.wait_tensor(x)
    return there


class _Depart(torch.autograd.Function):
    """Starts a journey; the result is for `_Arrive` alone. Backward waits for the gradients to come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.start(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.journey.end_back(), None


class _Arrive(torch.autograd.Function):
    """Waits for the end of a journey. Backward sends the gradients back, so that what was computed in between runs
    beside them there too; what it returns has the right shape, and nobody reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return arrived(x).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.journey.start_back(grads[0])
        return grads[0], None
