"""What ranks of a pipeline send each other: tensors, and the gradients of tied weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nanovl.spec import Model, Stream

Sent = tuple[Stream, list[Any]]
"""Tensors that must live until their transfer is over, and what to wait for."""


def send(tensors: Stream, to: int, group: dist.ProcessGroup | None) -> Sent:
    """Start sending `tensors` to rank `to` of `group`."""
    tensors = tuple(tensor.detach().contiguous() for tensor in tensors)
    return tensors, [dist.isend(tensor, group=group, group_dst=to) for tensor in tensors]


def receive(room: Stream, source: int, group: dist.ProcessGroup | None) -> Sent:
    """Start filling `room` with what rank `source` of `group` sends."""
    return room, [dist.irecv(tensor, group=group, group_src=source) for tensor in room]


def wait(sent: Sent) -> Stream:
    """The tensors, once their transfer is over."""
    tensors, works = sent
    for work in works:
        work.wait()
    return tensors


class TiedWeights:
    """A weight that the first stage and the last both need, each having its own.

    On two ranks both are trained, on the same gradient, and stay the same. On one rank, with stages in a V, the last
    stage's follows the first's.
    """

    def __init__(
        self,
        parts: Mapping[int, Model],
        last: int,
        rank_of: Mapping[int, int],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.parts, self.last, self.rank_of, self.group = parts, last, rank_of, group
        model = next(iter(parts.values()))
        self.children = set(model.first_children) & set(model.last_children)
        self.held = [stage for stage in (0, last) if stage in parts] if self.children else []

    @torch.no_grad()
    def share(self) -> None:
        """Copy the first stage's weights to the last's if that is on the same rank."""
        if len(self.held) < 2:
            return
        for stage in self.held:
            part = self.parts[stage]
            assert isinstance(part, FSDPModule)
            part.reshard()  # what was gathered before is out of date
        for copy, weight in zip(self._weights(self.last), self._weights(0), strict=True):
            _local(copy).copy_(_local(weight))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give both stages the sum of their gradients."""
        if len(self.held) == 2:
            for weight, copy in zip(self._weights(0), self._weights(self.last), strict=True):
                _gradient(weight).add_(_gradient(copy))
                copy.grad = None
            return
        for stage in self.held:
            for weight in self._weights(stage):
                mine = _gradient(weight)
                mine.add_(self._exchanged(mine, first=stage == 0))

    def _exchanged(self, mine: Tensor, first: bool) -> Tensor:
        """The other stage's tensor, for this one's."""
        peer = self.rank_of[self.last if first else 0]
        room = (torch.empty_like(mine),)
        # in turn, or both might wait for the other to receive
        if first:
            sent, arriving = send((mine,), peer, self.group), receive(room, peer, self.group)
        else:
            arriving, sent = receive(room, peer, self.group), send((mine,), peer, self.group)
        wait(sent)
        return wait(arriving)[0]

    def _weights(self, stage: int) -> list[nn.Parameter]:
        named = self.parts[stage].named_parameters()
        return [p for name, p in named if name.split(".")[0] in self.children and p.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return _local(weight.grad)
