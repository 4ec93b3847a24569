"""Batches of one data rank: for training without end, from a state that any number of ranks can take over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nanovl.config.schema import Job
from nanovl.data.lanes import Encoder, Lanes, LaneState, Plan
from nanovl.data.pack import Row, Tokens, concat_row, row_arrays
from nanovl.data.prefetch import Prefetcher
from nanovl.data.sources import changed_files, training_sources
from nanovl.errors import ConfigError, DataError
from nanovl.spec import Batch
from nanovl.tokenizer.text import valid_unicode

# B rows, T tokens


@dataclass(frozen=True)
class _Step:
    """One optimizer step's rows, and the lanes as they stand after it."""

    batches: list[Batch]
    lanes: dict[int, LaneState]
    documents: int
    cropped: int
    seconds: float
    """To make it."""


class Loader:
    """Training rows of the lanes r with r mod `degree` == `rank`, tokenized and packed in the background."""

    def __init__(self, job: Job, tokenizer: Encoder, *, rank: int, degree: int, global_rows: int = 0) -> None:
        """`global_rows` = rows of a step over all ranks; 0 = `training.global_batch_size`.

        Raises ConfigError and DataError for what can be known at the start.
        """
        self.job, self.tokenizer, self.rank = job, tokenizer, rank
        rows = global_rows or job.training.global_batch_size
        local = job.training.local_batch_size
        if rows <= 0 or rows % (degree * max(1, local)):
            raise ConfigError(
                f"training.global_batch_size = {rows} is no multiple of {degree} data ranks x {local} rows = "
                f"{degree * local}; use one, or set training.local_batch_size"
            )
        if tokenizer.bos_id is None:
            raise ConfigError(
                "tokenizer.path: this tokenizer has no token that begins a document; "
                "name one as bos_token in its tokenizer_config.json"
            )
        data, self.pad_token = job.data, tokenizer.bos_id
        seq_len, buffer = job.training.seq_len, data.buffer_documents
        self.plan = Plan(rows, job.debug.seed, data.shuffle, seq_len, data.packing, data.overflow, buffer)
        self.sources = training_sources(job, tokenizer.hash())
        self._taken = {r: LaneState() for r in range(rank, rows, degree)}
        self._start()
        self._reset_stats()

    def next_step(self) -> list[Batch]:
        """The next optimizer step's micro-batches: this rank's lanes in order, local_batch_size rows each.

        Raises DataError, also for what went wrong in the background.
        """
        began = time.perf_counter()
        step = self._steps.next()
        self._waited += time.perf_counter() - began
        self._taken = step.lanes
        for batch in step.batches:
            self._positions_seen += batch["weights_BT"].numel()
            self._tokens += int(batch["weights_BT"].sum())
        self._documents += step.documents
        self._cropped += step.cropped
        self._making += step.seconds
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """The lanes of this rank after the last step that was taken, as JSON values."""
        lanes = {str(r): lane.to_json() for r, lane in self._taken.items()}
        state: dict[str, Any] = {"made_for": self._made_for(), "lanes": lanes}
        if self.rank == 0:  # only to name the file that changed, so once is enough
            state["files"] = [source.file_sizes() for source in self.sources]
        return state

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the `state_dict` of every rank of a run, however many they were.

        Raises DataError where the run read other data, or made other rows of it, than this job does.
        """
        files: list[dict[str, int]] = next((state["files"] for state in states if "files" in state), [])
        lanes: dict[str, Any] = {}
        for state in states:
            self._require_same(state["made_for"], files)
            lanes |= state["lanes"]
        missing = [r for r in range(self.plan.rows) if str(r) not in lanes]
        if missing:
            raise DataError(
                f"--resume: the data state lacks {len(missing)} of {self.plan.rows} rows, such as row "
                f"{missing[0]}; give the states of all ranks that saved it"
            )
        self._steps.close()
        self._taken = {r: LaneState.from_json(lanes[str(r)]) for r in self._taken}
        self._start()
        self._reset_stats()

    def stats(self) -> dict[str, float]:
        """Of the steps taken since the last call, on this rank.

        Documents read, tokens with loss, utilisation = their share of all positions, cropped = share of the
        tokens read, seconds spent waiting, tokens made a second of work; and the latest epoch that a lane has
        reached.
        """
        read = self._tokens + self._cropped
        found = {
            "documents": self._documents,
            "tokens": self._tokens,
            "utilisation": self._tokens / max(1, self._positions_seen),
            "cropped": self._cropped / max(1, read),
            "wait_seconds": self._waited,
            "tokens_per_second": self._tokens / max(1e-9, self._making),
            "epoch": max((p.epoch for lane in self._taken.values() for p in lane.positions), default=0),
        }
        self._reset_stats()
        return found

    def close(self) -> None:
        """End the background thread; may be called twice."""
        self._steps.close()

    def _start(self) -> None:
        lanes = Lanes(self.sources, self.plan, self.tokenizer, self._taken, _threads())
        make = partial(_make_step, lanes, self.job, self.pad_token)
        self._steps = Prefetcher(make, self.job.data.prefetch_batches)

    def _made_for(self) -> dict[str, Any]:
        """All that decides which rows come."""
        plan, best_fit = self.plan, self.plan.packing == "best_fit"
        return {
            "training.global_batch_size": plan.rows,
            "training.seq_len": plan.seq_len,
            "debug.seed": plan.seed,
            "data.shuffle": plan.shuffle,
            "data.packing": plan.packing,
            "data.overflow": plan.overflow if best_fit else None,
            "data.buffer_documents": plan.buffer_documents if best_fit else None,
            "tokenizer": self.tokenizer.hash(),
            "data.sources": len(self.sources),
            **{f"{s.key}.{name}": value for s in self.sources for name, value in s.record().items()},
        }

    def _require_same(self, then: Mapping[str, Any], files: Sequence[Mapping[str, int]]) -> None:
        different = [(key, value) for key, value in self._made_for().items() if then.get(key) != value]
        if not different:
            return
        key, value = different[0]
        instead = "or start a fresh run from the weights (checkpoint.initial_load_path)"
        for source, before in zip(self.sources, files, strict=False):
            change = changed_files(before, source.file_sizes())
            if change and key in (f"{source.key}.files", f"{source.key}.fingerprint"):
                raise DataError(
                    f"--resume: {source.key} ({source.settings.path or source.settings.kind}): {change} "
                    f"since the checkpoint was written; put the files back as they were, {instead}"
                )
        raise DataError(
            f"--resume: {key} is {value}, the checkpoint's data was read with {then.get(key)}; "
            f"set it back, {instead}"
        )

    def _reset_stats(self) -> None:
        self._documents = self._tokens = self._positions_seen = self._cropped = 0
        self._waited = self._making = 0.0


def heldout_rows(
    texts: Iterable[str],
    tokenizer: Encoder,
    seq_len: int,
    max_bytes: int,
    rank: int,
    degree: int,
    local_batch_size: int,
) -> tuple[list[Batch], bytes]:
    """This rank's batches of held-out text, and all ranks' text: each byte of it under exactly one target.

    Whole documents are taken, the first always, until they make `max_bytes` (0 = all), and packed as
    `concat`. Row r goes to rank r mod `degree`; every rank gets the same number of full batches, the last
    ones filled with rows without loss. Raises DataError where there is no text.
    """
    taken: list[str] = []
    size = 0
    for text in texts:
        taken.append(valid_unicode(text))
        size += len(taken[-1].encode())
        if max_bytes and size >= max_bytes:
            break
    if not taken:
        raise DataError("validation: the held-out files hold no text; name others in [[validation.sources]]")
    assert tokenizer.bos_id is not None
    documents = iter(tokenizer.encode_batch(taken, bos=True, threads=_threads()))
    rest: list[Tokens] = []
    rows: list[list[Tokens]] = []

    def pull() -> Tokens | None:
        ids = next(documents, None)
        return None if ids is None else np.array(ids, dtype=np.int32)

    row = concat_row(rest, pull, seq_len + 1).pieces
    while sum(map(len, row)) > 1:  # a token alone has no target
        rows.append(row)
        row = concat_row(rest, pull, seq_len + 1).pieces
    num_batches = -(-len(rows) // (degree * local_batch_size))
    mine = rows[rank::degree]
    mine += [[]] * (num_batches * local_batch_size - len(mine))
    return _batches(mine, seq_len, tokenizer.bos_id, local_batch_size, False), "".join(taken).encode()


def _threads() -> int:
    """Threads that tokenize: ranks share the cores of a large machine, and those of a small one compute."""
    return max(1, min(4, (os.cpu_count() or 1) // 16))


def _make_step(lanes: Lanes, job: Job, pad_token: int) -> _Step:
    began = time.perf_counter()
    rows: list[Row] = lanes.next_rows()
    training, cross = job.training, job.data.cross_document_attention
    pieces = [row.pieces for row in rows]
    batches = _batches(pieces, training.seq_len, pad_token, training.local_batch_size or len(rows), cross)
    documents, cropped = sum(row.documents for row in rows), sum(row.cropped for row in rows)
    return _Step(batches, lanes.state(), documents, cropped, time.perf_counter() - began)


def _batches(
    rows: Sequence[Sequence[Tokens]], seq_len: int, pad_token: int, local_batch_size: int, cross: bool
) -> list[Batch]:
    """Rows -> micro-batches of `local_batch_size` rows."""
    arrays = [row_arrays(pieces, seq_len, pad_token, cross) for pieces in rows]
    return [
        {key: torch.from_numpy(np.stack([row[key] for row in part])) for key in part[0]}
        for part in (arrays[i : i + local_batch_size] for i in range(0, len(arrays), local_batch_size))
    ]
