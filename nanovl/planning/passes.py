"""Forward and backward of a step, moment by moment: what is alive at the same time on one rank.

Beside what micro-batches keep, FSDP holds, as torch 2.13 does it (U = a block's whole weights):

    forward of a block     U, and the buffer in which they came
    its backward           U, the buffer in which the next block's come, and the last block's gradients being summed
    behind it              that buffer, the block's whole gradients, and their copy that is summed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nanovl.parallelisms.pipeline_schedule import Action
from nanovl.planning.rehearsal import Moment, Rehearsed
from nanovl.planning.sharding import StageUnits, Unit, UseOfUnits

Place = tuple[int, int]
"""A stage and a micro-batch."""


def most_in_passes(
    order: Sequence[Action], runs: Mapping[int, Rehearsed], stages: Mapping[int, StageUnits], use: UseOfUnits
) -> int:
    """Bytes alive at most while a rank works through `order`, beside parameters and optimizer state."""
    halves = {(a.stage, a.micro_batch) for a in order if a.kind == "backward_weight"}
    rank = _Rank(runs, stages, use)
    for kind, stage, i in order:
        place = stage, i
        if kind == "receive_stream":
            rank.kept[place] = runs[stage].inputs[1]
        elif kind == "receive_gradient":
            rank.kept[place] += runs[stage].outputs[1]
        elif kind == "forward":
            rank.forward(place)
        elif kind == "backward_input" and place in halves:
            if runs[stage].parted_bytes:
                rank.first_half(place)  # where the model begins, all of it is done with the weights
        elif kind == "backward_weight" and runs[stage].parted_bytes:
            rank.second_half(place)
        elif kind in ("backward", "backward_input", "backward_weight"):
            rank.backward(place)
    return rank.most


class _Rank:
    """A rank at work: what micro-batches keep, gradients, and the most so far."""

    def __init__(
        self, runs: Mapping[int, Rehearsed], stages: Mapping[int, StageUnits], use: UseOfUnits
    ) -> None:
        self.runs, self.stages, self.use = runs, stages, use
        self.kept: dict[Place, int] = {}
        self.whole: dict[int, int] = {}
        """Whole gradients of a stage that wait for its last backward."""
        self.shards: dict[int, int] = {}
        """The rank's shards of gradients, once they are there to be added to."""
        self.finished = dict.fromkeys(runs, 0)
        self.most = 0

    def forward(self, place: Place) -> None:
        run, units = self.runs[place[0]], self.stages[place[0]]
        self._at_work(place, max(_in_forward(moment, units, self.use) for moment in run.forward))
        self.kept[place] = run.kept_bytes

    def backward(self, place: Place) -> None:
        self._in_backward(place, sums=self._is_summed(place[0]))
        self._finish(place)

    def first_half(self, place: Place) -> None:
        self._in_backward(place, sums=False)
        self.kept[place] = self.runs[place[0]].parted_bytes

    def second_half(self, place: Place) -> None:
        units = self.stages[place[0]].all
        largest = max(unit.largest_elements for unit in units) * self.use.param_bytes
        self._at_work(place, self.kept[place] + _gathered(units, self.use) + largest)
        self._finish(place)

    def _in_backward(self, place: Place, *, sums: bool) -> None:
        run, units = self.runs[place[0]], self.stages[place[0]]
        grow = place[0] not in self.shards
        self._at_work(place, max(_in_backward(run.backward, units, self.use, sums=sums, shards_grow=grow)))

    def _at_work(self, place: Place, alive: int) -> None:
        """On `place`, which has that much alive, beside everything else."""
        others = sum(kept for other, kept in self.kept.items() if other != place)
        if not self.use.reshards:
            others += sum(_gathered(u.all, self.use) for s, u in self.stages.items() if s != place[0])
        self.most = max(self.most, alive + others + sum(self.whole.values()) + sum(self.shards.values()))

    def _is_summed(self, stage: int) -> bool:
        return self.finished[stage] + 1 > self.use.micro_batches - self.use.reduces

    def _finish(self, place: Place) -> None:
        stage, units = place[0], self.stages[place[0]].all
        del self.kept[place]
        if self._is_summed(stage):
            self.whole.pop(stage, 0)
            self.shards[stage] = _shards(units, self.use)
        else:
            self.whole[stage] = sum(unit.whole_elements for unit in units) * self.use.reduce_bytes
        self.finished[stage] += 1


def _in_forward(moment: Moment, units: StageUnits, use: UseOfUnits) -> int:
    if not use.reshards:
        return moment.most + _gathered(units.all, use)
    here = units.of(moment.layer)
    return (
        moment.most
        + _gathered([*units.root, *here], use)
        + _buffers(here or units.of(len(units.blocks) - 1), use)
    )


def _in_backward(
    moments: Sequence[Moment], units: StageUnits, use: UseOfUnits, *, sums: bool, shards_grow: bool
) -> list[int]:
    """At work on each piece, and right behind it."""
    found, summing, grown = [], 0, 0
    for moment in moments:
        at_end = moment is moments[0]
        before = units.of(len(units.blocks) - 1 if at_end else (moment.layer or 0) - 1)
        coming = _buffers(before, use) if use.reshards else 0
        resident = _gathered(units.root if use.reshards else units.all, use)
        here = [] if at_end else units.of(moment.layer) or units.root
        in_use = _gathered(here, use) if use.reshards and moment.layer is not None else 0
        found.append(moment.most + resident + in_use + coming + summing + grown)
        elements = sum(unit.whole_elements for unit in here)
        if sums and elements:
            summing = elements * use.reduce_bytes
            shard = _shards(here, use)
            # the head's whole gradients are among what is left
            own = elements * use.param_bytes if moment.layer is not None else 0
            found.append(moment.left + resident + coming + own + summing + shard + grown)
            grown += shard if shards_grow else 0
    return found


def _gathered(units: Sequence[Unit], use: UseOfUnits) -> int:
    return sum(unit.whole_elements for unit in units) * use.param_bytes


def _buffers(units: Sequence[Unit], use: UseOfUnits) -> int:
    """In which weights arrive; a rank that shares them with nobody copies its own."""
    return sum(unit.whole_elements for unit in units if unit.shards > 1) * use.param_bytes


def _shards(units: Sequence[Unit], use: UseOfUnits) -> int:
    return sum(unit.shard_elements for unit in units) * use.master_bytes
