"""One micro-batch forward and backward through a part of the model, on fake tensors, with its real collectives.

Layers of one kind cost the same, so at most two of each kind run: the first also makes what all layers share (masks,
rotation tables), the second stands for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanovl.parallelisms.pipeline_backward import backward_inputs
from nanovl.planning.ledger import Account, Ledger, Traffic
from nanovl.spec import Inputs, Model, Stream

RUNS_OF_A_KIND = 2


@dataclass(eq=False)
class Passed:
    """What one layer, or what stands before or after the layers, costs: books of its forward and of its backward."""

    forward: Account = field(default_factory=Account)
    backward: Account = field(default_factory=Account)

    @property
    def kept(self) -> int:
        """Bytes alive from the one to the other."""
        return self.forward.after - self.forward.before


@dataclass(frozen=True)
class Moment:
    """One piece of a part's forward or backward."""

    layer: int | None
    """Block at work, by its place in the part; None = what stands before or after the blocks."""
    most: int
    """Bytes alive at most, of this micro-batch, its whole gradients among them."""
    left: int
    """Bytes alive at the end, without gradients of the blocks."""


@dataclass
class Rehearsed:
    """What one micro-batch costs a rank, FSDP and the pipeline apart."""

    kept_bytes: int
    """Alive between forward and backward."""
    working_bytes: int
    """Most that is alive beyond that, at any time."""
    forward: list[Moment]
    backward: list[Moment]
    """Of a parted backward, the first half."""
    parted_bytes: int
    """Alive between the halves of a parted backward; 0 where it is not parted."""
    head_bytes: int
    """Alive at most beyond that while the loss works on its chunks of logits."""
    traffic: Traffic
    forward_flops: float
    """Of the layers' matrix products."""
    recomputed_flops: float
    """Of these, those that backward does again."""
    inputs: tuple[int, int]
    """Tensors of the stream that enters, and their bytes."""
    outputs: tuple[int, int]
    """The same of what leaves."""


def rehearse(
    part: Model, forward: Callable[[], tuple[Stream, Any]], *, split_backward: bool = False
) -> Rehearsed:
    """Run `forward`, which calls `part`, and its backward; it returns the stream that enters (empty where the model
    begins), and the loss or the stream that leaves. Wants FakeTensorMode."""
    watched = _Watched(part)
    entered, left = watched.run(forward, halves=False)
    passed, sequence = watched.passed, watched.sequence
    traffic = Traffic()
    for p in sequence:
        traffic.add_all(p.forward.traffic)
        traffic.add_all(p.backward.traffic)
    layers = [p for p in sequence if p not in (passed["start"], passed["end"])]
    forward_flops = sum(p.forward.flops for p in layers)
    backward_flops = sum(p.backward.flops for p in layers)
    parted = split_backward and len(entered) > 0  # where the model begins nobody waits for the first half
    if parted:
        part.zero_grad()
        watched.run(forward, halves=True)
    going, coming = _moments(watched.sequence, parted)
    kept = going[-1].left
    return Rehearsed(
        kept,
        max(moment.most for moment in (*going, *coming)) - kept,
        going,
        coming,
        coming[-1].left if parted else 0,
        passed["end"].forward.peak - passed["end"].forward.after,
        traffic,
        forward_flops,
        max(0.0, backward_flops - 2 * forward_flops),
        _number_and_bytes(entered),
        _number_and_bytes(left),
    )


def _moments(sequence: list[Passed], parted: bool) -> tuple[list[Moment], list[Moment]]:
    """Forward and backward of pieces in a row."""
    alive, last = 0, len(sequence) - 1
    going: list[Moment] = []
    coming: list[Moment] = []
    for i, p in enumerate(sequence):
        most = alive + p.forward.peak - p.forward.before
        alive += p.kept
        going.append(Moment(_layer(i, last), most, alive))
    for i, p in reversed(list(enumerate(sequence))):
        most = alive + p.backward.peak - p.backward.before
        grown = p.backward.after - p.backward.before
        # FSDP takes the gradients of a block at once; those of the head wait for the end
        alive += grown if parted or i == last else -p.kept
        coming.append(Moment(_layer(i, last), most, alive))
    return going, coming


def _layer(place: int, last: int) -> int | None:
    return place - 1 if 0 < place < last else None


def _number_and_bytes(stream: Stream) -> tuple[int, int]:
    return len(stream), sum(tensor.numel() * tensor.element_size() for tensor in stream)


class _Watched:
    """A part whose pieces book on accounts of their own; it is changed for good."""

    def __init__(self, part: Model) -> None:
        self.ledger = Ledger()
        self.begin, self.block, self.end = part.begin, part.pass_block, part.end
        self.stream_width = part.stream_width
        part.begin, part.pass_block, part.end = self._begin, self._pass_block, self._end  # type: ignore[method-assign]

    def run(
        self, forward: Callable[[], tuple[Stream, Any]], *, halves: bool
    ) -> tuple[Stream, tuple[Tensor, ...]]:
        """Forward and backward on new books; with `halves`, those of the first half of a parted backward."""
        self.passed: dict[str, Passed] = {"start": Passed(), "end": Passed()}
        self.kinds: dict[Any, list[Passed]] = {}
        self.sequence = [self.passed["start"]]
        self.ledger = Ledger()
        self.ledger.open(self.passed["start"].forward)
        with self.ledger as ledger:
            entered, left = forward()
            self.enter_backward("end")
            left = left if isinstance(left, tuple) else (left,)
            outs = [tensor for tensor in left if tensor.requires_grad]
            gradients = [torch.ones_like(tensor) for tensor in outs]
            if halves:
                _, later = backward_inputs(outs, gradients, entered)
                ledger.open(Account())
                later.run()
            else:
                torch.autograd.backward(outs, gradients)
            ledger.open(Account())
        if self.sequence[-1] is not self.passed["end"]:  # a part without the head
            self.sequence.append(self.passed["end"])
        return entered, left

    def enter_backward(self, name: str) -> None:
        self.ledger.open(self.passed[name].backward)

    def _begin(self, inputs: Inputs) -> Stream:
        return self._mark("start", self.begin(inputs))

    def _pass_block(self, index: int, block: nn.Module, stream: Stream, inputs: Inputs) -> Stream:
        self.ledger.open(Account())  # ends the piece before, now that its input is let go
        alike = self.kinds.setdefault((_kind(block), len(stream), self.stream_width(index + 1)), [])
        if len(alike) == RUNS_OF_A_KIND:
            self.sequence.append(alike[-1])
            return stream
        name = str(index)
        passed = self.passed[name] = Passed()
        alike.append(passed)
        self.sequence.append(passed)
        self.ledger.open(passed.forward)
        return self._mark(name, self.block(index, block, stream, inputs))

    def _end(self, stream: Stream) -> Tensor:
        self.sequence.append(self.passed["end"])
        self.ledger.open(self.passed["end"].forward)
        return self.end(stream)

    def _mark(self, name: str, stream: Stream) -> Stream:
        """Its gradient is the first thing that the backward of piece `name` needs."""
        if stream[0].requires_grad:
            stream[0].register_hook(lambda _: self.enter_backward(name))
        return stream


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that do the same: modules, their plain settings, parameter shapes, and what wraps forward."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, repr(value)) for key, value in sorted(vars(module).items()) if _plain(value)),
            tuple((key, p.shape) for key, p in module.named_parameters(recurse=False)),
            "forward" in vars(module),
        )
        for name, module in block.named_modules()
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or is_dataclass(value)
