"""Pipeline parallelism: successive layers on different ranks, micro-batches in flight between them.

What travels is the model's stream. Its shape follows from the batch, which all ranks of a pipeline know; so ranks agree
on nothing beforehand, and shapes may change from call to call.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from nanovl.config.schema import Job
from nanovl.device import Modes
from nanovl.mesh import Mesh
from nanovl.parallelisms.fsdp import reshards_after_forward
from nanovl.parallelisms.pipeline_backward import WeightsLater, backward_inputs
from nanovl.parallelisms.pipeline_schedule import Kind, actions
from nanovl.parallelisms.pipeline_split import stages_of, stages_per_rank
from nanovl.parallelisms.pipeline_transfer import Sent, TiedWeights, receive, send, wait
from nanovl.spec import Batch, Model, Stream, run_batch

# B rows, T tokens, D model

Place = tuple[int, int]
"""A stage and a micro-batch."""


@dataclass
class Passage:
    """A micro-batch in a stage, between its forward and its last backward."""

    inputs: Stream
    """Empty where the model begins."""
    outputs: Stream
    """The stream, or the loss."""
    gradients: Stream | None = None
    """Of the outputs, once they are used; None = of a loss."""
    weights_later: WeightsLater | None = None


@dataclass
class Step:
    """What is under way in one step on this rank."""

    batches: Sequence[Batch]
    objective: Callable[..., Any]
    documents: bool
    loss: Tensor
    """Sum so far, of each loss that the objective returns."""
    passages: dict[Place, Passage] = field(default_factory=dict)
    streams: dict[Place, Stream] = field(default_factory=dict)
    """Made and not yet used, by the place that wants them; so are the others."""
    gradients: dict[Place, Stream] = field(default_factory=dict)
    arriving_streams: dict[Place, Sent] = field(default_factory=dict)
    arriving_gradients: dict[Place, Sent] = field(default_factory=dict)
    leaving: deque[Sent] = field(default_factory=deque)
    finished: Counter[int] = field(default_factory=Counter)
    """Micro-batches that are through with backward, by stage."""


def whole_backward_reasons(job: Job, mesh: Mesh, modes: Modes) -> list[str]:
    """Settings under which a block's backward is one node of the graph, which halves would run twice."""
    found = {
        "compiled blocks": modes.compile,
        "activation_checkpoint": job.activation_checkpoint.mode != "none",
        'fsdp_reshard_after_forward = "always"': reshards_after_forward(job.parallelism, mesh),
    }
    return [name for name, holds in found.items() if holds]


class Pipeline:
    """Runs batches through all ranks' stages; every rank of a pipeline makes the same calls."""

    def __init__(self, parts: Sequence[Model], job: Job, mesh: Mesh, modes: Modes) -> None:
        self.config, self.group, self.rank = job.parallelism, mesh.group("pp"), mesh.rank("pp")
        self.parts = dict(zip(stages_of(self.rank, self.config), parts, strict=True))
        self.rank_of = {s: rank for rank in range(mesh.size("pp")) for s in stages_of(rank, self.config)}
        self.last = mesh.size("pp") * stages_per_rank(self.config) - 1
        self.tied = TiedWeights(self.parts, self.last, self.rank_of, self.group)
        self.stream_dtype, self.sequence_ranks = modes.param_dtype, mesh.size("tp")
        self.reshards = reshards_after_forward(self.config, mesh)
        whole_backward = bool(whole_backward_reasons(job, mesh, modes))
        # what passes through a stage leaves it as a view, which nothing here changes in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.plan = cache(partial(actions, self.config, split_backward=not whole_backward))

    def backward(self, batches: Sequence[Batch], objective: Callable[..., Any], documents: bool) -> Tensor:
        """Forward and backward of all micro-batches; the sums of their losses on the last stage's ranks, else 0.

        Gradients are summed over data ranks once, after a stage's last backward.
        """
        self.tied.share()
        for part in self.parts.values():
            self._sum_gradients_next(part, False)
        device = batches[0]["tokens_BT"].device
        step = Step(batches, objective, documents, torch.zeros((), device=device))
        do: dict[Kind, Callable[[Step, int, int], None]] = {
            "forward": self._forward,
            "backward": self._backward,
            "backward_input": self._backward_input,
            "backward_weight": self._backward_weight,
            "send_stream": self._send_stream,
            "receive_stream": self._receive_stream,
            "send_gradient": self._send_gradient,
            "receive_gradient": self._receive_gradient,
        }
        for kind, stage, i in self.plan(len(batches))[self.rank]:
            do[kind](step, stage, i)
            self._let_go(step.leaving)
        for sent in step.leaving:
            wait(sent)
        left_over = [*step.passages, *step.streams, *step.gradients]
        assert not left_over, left_over
        self.tied.sum_gradients()
        return step.loss

    def evaluate(self, batch: Batch, objective: Callable[..., Any], documents: bool) -> Any:
        """What `objective` returns on the last stage's ranks, else None; under no_grad."""
        self.tied.share()
        stream: Stream = ()
        for stage in range(self.last + 1):
            here, there = self.rank_of[stage], self.rank_of.get(stage + 1)
            if here == self.rank:
                stream = self._run(stage, batch, stream, objective, documents)
            if here == there:
                continue
            if here == self.rank and there is not None:
                wait(self._send(stream, there))
            elif there == self.rank:
                stream = wait(self._receive(self._room(stage + 1, batch), here))
        return stream if self.rank_of[self.last] == self.rank else None

    def _run(
        self, stage: int, batch: Batch, stream: Stream, objective: Callable[..., Any], documents: bool
    ) -> Any:
        """The stream after `stage`, or what `objective` returns."""
        return run_batch(self.parts[stage], batch, objective, documents=documents, stream=stream)

    def _forward(self, step: Step, stage: int, i: int) -> None:
        stream: Stream = ()
        if stage > 0:
            stream = _take(step.streams, step.arriving_streams, (stage, i))
        # leaves of their own, so that each stage has its own graph
        inputs = tuple(tensor.detach().requires_grad_() for tensor in stream)
        found = self._run(stage, step.batches[i], inputs, step.objective, step.documents)
        if stage == self.last:
            step.loss = step.loss + found.detach()
            found = (found.sum(),)
        else:
            step.streams[stage + 1, i] = found
        step.passages[stage, i] = Passage(inputs, found)

    def _backward(self, step: Step, stage: int, i: int) -> None:
        passage = self._begin_backward(step, stage, i)
        self._finish_with_backward(step, stage, i, passage)
        self._hand_on_gradients(step, stage, i, [tensor.grad for tensor in passage.inputs], passage)

    def _backward_input(self, step: Step, stage: int, i: int) -> None:
        passage = self._begin_backward(step, stage, i)
        step.passages[stage, i] = passage
        if stage == 0:
            return  # nobody waits: all of it is done with the weights
        gradients, passage.weights_later = backward_inputs(passage.outputs, passage.gradients, passage.inputs)
        self._hand_on_gradients(step, stage, i, gradients, passage)
        passage.inputs = passage.outputs = ()

    def _backward_weight(self, step: Step, stage: int, i: int) -> None:
        passage = step.passages.pop((stage, i))
        if passage.weights_later is None:
            self._finish_with_backward(step, stage, i, passage)
            return
        passage.weights_later.run()
        part = self.parts[stage]
        self._sum_gradients_next(part, self._is_last_of(step, stage))
        # FSDP takes in gradients at the end of a backward through the part, of which it has seen none
        state: Any = fully_shard.state(part)  # type: ignore[attr-defined]
        state._root_post_backward_final_callback()

    def _begin_backward(self, step: Step, stage: int, i: int) -> Passage:
        passage = step.passages.pop((stage, i))
        if stage != self.last:
            passage.gradients = _take(step.gradients, step.arriving_gradients, (stage, i))
        return passage

    def _finish_with_backward(self, step: Step, stage: int, i: int, passage: Passage) -> None:
        """The whole backward in one; FSDP sums gradients within it if it is the stage's last."""
        if self._is_last_of(step, stage):
            self._sum_gradients_next(self.parts[stage], True)
        gradients = passage.gradients or (None,)
        found = [
            pair for pair in zip(passage.outputs, gradients, strict=True) if pair[0].requires_grad
        ]  # none where all weights so far are frozen
        torch.autograd.backward([output for output, _ in found], [gradient for _, gradient in found])

    def _hand_on_gradients(
        self, step: Step, stage: int, i: int, gradients: Sequence[Tensor | None], passage: Passage
    ) -> None:
        if stage > 0:
            step.gradients[stage - 1, i] = tuple(
                torch.zeros_like(tensor) if gradient is None else gradient
                for tensor, gradient in zip(passage.inputs, gradients, strict=True)
            )

    def _is_last_of(self, step: Step, stage: int) -> bool:
        step.finished[stage] += 1
        return step.finished[stage] == len(step.batches)

    def _sum_gradients_next(self, part: Model, now: bool) -> None:
        """Whether FSDP sums gradients over data ranks in the part's next backward, and lets go of gathered weights."""
        assert isinstance(part, FSDPModule)
        part.set_is_last_backward(now)
        part.set_requires_gradient_sync(now)
        part.set_reshard_after_backward(now or self.reshards)

    def _send_stream(self, step: Step, stage: int, i: int) -> None:
        step.leaving.append(self._send(step.streams.pop((stage + 1, i)), self.rank_of[stage + 1]))

    def _receive_stream(self, step: Step, stage: int, i: int) -> None:
        room = self._room(stage, step.batches[i])
        step.arriving_streams[stage, i] = self._receive(room, self.rank_of[stage - 1])

    def _send_gradient(self, step: Step, stage: int, i: int) -> None:
        step.leaving.append(self._send(step.gradients.pop((stage - 1, i)), self.rank_of[stage - 1]))

    def _receive_gradient(self, step: Step, stage: int, i: int) -> None:
        room = tuple(torch.empty_like(tensor) for tensor in step.passages[stage, i].outputs)
        step.arriving_gradients[stage, i] = self._receive(room, self.rank_of[stage + 1])

    def _room(self, stage: int, batch: Batch) -> Stream:
        """Memory for the stream that enters `stage`."""
        part, tokens_BT = self.parts[stage], batch["tokens_BT"]
        rows, tokens = tokens_BT.shape
        assert tokens % self.sequence_ranks == 0, f"{tokens} tokens over {self.sequence_ranks} tensor ranks"
        shape = (rows, tokens // self.sequence_ranks, part.config.hidden_size)
        width = part.stream_width(int(next(iter(part.layers))))
        return tuple(
            torch.empty(shape, dtype=self.stream_dtype, device=tokens_BT.device) for _ in range(width)
        )

    def _send(self, stream: Stream, to: int) -> Sent:
        assert all(tensor.dtype == self.stream_dtype for tensor in stream), [
            tensor.dtype for tensor in stream
        ]
        return send(stream, to, self.group)

    def _let_go(self, leaving: deque[Sent]) -> None:
        """Free tensors that have been sent.

        A gloo transfer never says so by itself, so an old one is waited for; it is no risk, since the orders of all
        ranks would run with transfers that block.
        """
        while leaving and (
            len(leaving) > self.config.pipeline_parallel_degree
            or all(work.is_completed() for work in leaving[0][1])
        ):
            wait(leaving.popleft())

    def _receive(self, room: Stream, source: int) -> Sent:
        return receive(room, source, self.group)


def _take(ready: dict[Place, Stream], arriving: dict[Place, Sent], place: Place) -> Stream:
    """Tensors made on this rank or, once they are here, on another."""
    return ready.pop(place) if place in ready else wait(arriving.pop(place))
