"""Lanes: row slot r of every global batch is fed by lane r, a stream of documents and a packer of its own.

What a lane makes depends on (seed, rows of the global batch, sources, packing) and on nothing else; so it is
the same whichever rank owns it, and its state moves to any number of ranks.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from nanovl.data.documents import Position, epoch_documents, furthest_behind
from nanovl.data.pack import Row, Tokens, best_fit_row, concat_row
from nanovl.data.readers import Document
from nanovl.data.sources import OpenSource
from nanovl.errors import DataError

UNITS_A_LANE = 4
"""A source with fewer units than this for each lane is dealt out by documents."""
DOCUMENTS_AHEAD = 8
"""Documents of a source that a lane tokenizes at a time."""


class Encoder(Protocol):
    """What this room asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, threads: int = 1
    ) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def hash(self) -> str: ...


@dataclass(frozen=True)
class Plan:
    """How rows are made of documents."""

    rows: int
    """Rows of a global batch = lanes."""
    seed: int
    shuffle: bool
    seq_len: int
    packing: Literal["best_fit", "concat"]
    overflow: Literal["crop", "pad", "split"]
    buffer_documents: int


class LaneState(NamedTuple):
    """Where a lane stands after a row. It shares its arrays, which nobody changes, so one costs little."""

    tokens: tuple[int, ...] = ()
    """Given by each source."""
    positions: tuple[Position, ...] = ()
    """In each source."""
    waiting: tuple[Tokens, ...] = ()
    """Documents in the packer."""

    def to_json(self) -> dict[str, Any]:
        waiting = np.concatenate(self.waiting) if self.waiting else np.zeros(0, dtype=np.int32)
        return {
            "tokens": list(self.tokens),
            "positions": [list(position) for position in self.positions],
            # little-endian int32 in base64: as numbers, the millions of them take seconds to write
            "waiting": base64.b64encode(waiting.astype("<i4").tobytes()).decode(),
            "lengths": [len(tokens) for tokens in self.waiting],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LaneState:
        waiting = np.frombuffer(base64.b64decode(data["waiting"]), dtype="<i4").astype(np.int32)
        return cls(
            tuple(data["tokens"]),
            tuple(Position(*position) for position in data["positions"]),
            tuple(np.split(waiting, np.cumsum(data["lengths"])[:-1])) if data["lengths"] else (),
        )


class Feed:
    """One source's documents for the lanes of a rank, each lane from its own position on, epoch after epoch.

    With UNITS_A_LANE units a lane or more, lane r reads every rows-th unit of the epoch's order from r on, so
    a rank reads only its share. With fewer, document i of the epoch goes to lane i mod rows: the rank reads
    everything, once for all of its lanes, and keeps what a lane that is behind has not asked for yet.
    """

    def __init__(self, source: OpenSource, plan: Plan, starts: Mapping[int, Position]) -> None:
        """`starts` = the position of each lane of this rank."""
        self.source, self.plan, self.starts = source, plan, starts
        self.by_document = source.num_units < UNITS_A_LANE * plan.rows
        self.queues: dict[int, deque[tuple[Document, Position]]] = {lane: deque() for lane in starts}
        shared = self._stream(min(starts.values())) if self.by_document else None
        self.streams = {lane: shared or self._stream(start, lane) for lane, start in starts.items()}

    def pull(self, lane: int) -> tuple[Document, Position]:
        """The lane's next document, and the position after it. Raises DataError where an epoch has none."""
        queue = self.queues[lane]
        while not queue:
            document, position = next(self.streams[lane])
            owner = (position.number - 1) % self.plan.rows if self.by_document else lane
            if owner in self.queues and position > self.starts[owner]:
                self.queues[owner].append((document, position))
        return queue.popleft()

    def require_documents(self) -> None:
        """Raise DataError now, on every rank, where documents are dealt out and a lane would get none."""
        if self.by_document:
            next(True for _, position in self._stream(Position()) if position.number == self.plan.rows)

    def _stream(self, start: Position, lane: int | None = None) -> Iterator[tuple[Document, Position]]:
        plan = self.plan
        share = {} if lane is None else {"lane": lane, "lanes": plan.rows}
        while True:
            number = start.number
            for item in epoch_documents(self.source, start, seed=plan.seed, shuffle=plan.shuffle, **share):
                number = item[1].number
                yield item
            if number == 0:
                where = "the whole source" if lane is None else f"the share of row {lane}"
                raise DataError(
                    f"{self.source.key}: every document in {where} is empty; "
                    "name other text, or remove the empty documents"
                )
            if lane is None and number < plan.rows:
                raise DataError(
                    f"{self.source.key}: {number} documents are too few for the {plan.rows} rows of a global "
                    f"batch, which take turns; set training.global_batch_size to {number} or less, "
                    "or add documents"
                )
            start = Position(epoch=start.epoch + 1)


@dataclass
class _Lane:
    """What of a lane changes."""

    tokens: list[int]
    positions: list[Position]
    waiting: list[Tokens]
    ahead: list[deque[tuple[Tokens, Position]]]
    """Tokenized documents of each source that the packer has not asked for yet; not part of the state."""


class Lanes:
    """The lanes of one rank."""

    def __init__(
        self,
        sources: Sequence[OpenSource],
        plan: Plan,
        tokenizer: Encoder,
        states: Mapping[int, LaneState],
        threads: int = 1,
    ) -> None:
        """`states` = the lanes of this rank; an empty LaneState stands at the beginning. `threads` tokenize.

        Raises DataError where a lane would get no document of a source that is dealt out by documents.
        """
        self.plan, self.tokenizer, self.threads = plan, tokenizer, threads
        self.weights = [source.settings.weight for source in sources]
        self.bos = np.array([tokenizer.bos_id], dtype=np.int32)
        # what a packer can use of a document at most: the rest must not count as the source's share
        loses_ends = plan.packing == "best_fit" and plan.overflow != "split"
        self.usable = plan.seq_len + 1 if loses_ends else None
        self.lanes = {
            r: _Lane(
                list(state.tokens) or [0] * len(sources),
                list(state.positions) or [Position()] * len(sources),
                list(state.waiting),
                [deque() for _ in sources],
            )
            for r, state in states.items()
        }
        self.feeds = [
            Feed(source, plan, {r: lane.positions[s] for r, lane in self.lanes.items()})
            for s, source in enumerate(sources)
        ]
        for feed in self.feeds:
            feed.require_documents()

    def next_rows(self) -> list[Row]:
        """One row of each lane, in the order of the lanes."""
        places = [(r, s) for r in self.lanes for s in range(len(self.feeds))]
        # asking for all lanes at once lets the tokenizer use its threads
        self._tokenize([(r, s) for r, s in places if len(self.lanes[r].ahead[s]) < DOCUMENTS_AHEAD])
        return [self._row(r, lane) for r, lane in self.lanes.items()]

    def state(self) -> dict[int, LaneState]:
        """Where every lane stands after its latest row."""
        return {
            r: LaneState(tuple(lane.tokens), tuple(lane.positions), tuple(lane.waiting))
            for r, lane in self.lanes.items()
        }

    def _row(self, r: int, lane: _Lane) -> Row:
        plan = self.plan

        def pull() -> Tokens:
            return self._document(r, lane)

        if plan.packing == "concat":
            return concat_row(lane.waiting, pull, plan.seq_len + 1)
        slots, buffer = plan.seq_len + 1, plan.buffer_documents
        return best_fit_row(lane.waiting, pull, slots, buffer, plan.overflow, self.bos)

    def _document(self, r: int, lane: _Lane) -> Tokens:
        """The lane's next document: from the source that is furthest behind its share of the tokens."""
        s = furthest_behind(lane.tokens, self.weights, range(len(self.weights)))
        if not lane.ahead[s]:
            self._tokenize([(r, s)])
        document, lane.positions[s] = lane.ahead[s].popleft()
        lane.tokens[s] += len(document) if self.usable is None else min(len(document), self.usable)
        return document

    def _tokenize(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Read and tokenize the next documents of each (lane, source), all in one batch."""
        read = [(r, s, *self.feeds[s].pull(r)) for r, s in wanted for _ in range(DOCUMENTS_AHEAD)]
        texts = [document for _, _, document, _ in read if isinstance(document, str)]
        encoded = iter(self.tokenizer.encode_batch(texts, bos=True, threads=self.threads) if texts else [])
        for r, s, document, position in read:
            if isinstance(document, str):
                tokens = np.array(next(encoded), dtype=np.int32)
            else:
                tokens = np.concatenate((self.bos, document))
            self.lanes[r].ahead[s].append((tokens, position))
