"""Streams of whole documents: one epoch of a source, the text a tokenizer learns from, the held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nanovl.config.schema import Job, Source
from nanovl.data.order import digest, permutation, shuffled
from nanovl.data.readers import Document
from nanovl.data.sources import OpenSource, Split, open_source
from nanovl.errors import DataError


class Position(NamedTuple):
    """A place in a source's endless stream: right after a document."""

    epoch: int = 0
    unit: int = 0
    """Place of the current unit in the epoch's order, among the units of this stream."""
    document: int = 0
    """Documents of that unit that are behind."""
    number: int = 0
    """Documents of the epoch that are behind."""


def epoch_documents(
    source: OpenSource, start: Position, *, seed: int, shuffle: bool, lane: int = 0, lanes: int = 1
) -> Iterator[tuple[Document, Position]]:
    """The rest of epoch `start.epoch` in every `lanes`th unit from `lane` on, each with the place after it.

    The order of the units, and that of the documents in a unit, depends on (seed, source, epoch) alone.
    """
    epoch, first, skip, number = start
    order: Sequence[int] = range(source.num_units)
    if shuffle:
        order = permutation(source.num_units, seed, "units", source.key, epoch).tolist()
    for place, unit in enumerate(order[lane::lanes][first:], first):
        documents = source.documents(unit)
        if shuffle:
            documents = shuffled(documents, seed, "documents", source.key, epoch, unit)
        for behind, document in enumerate(documents, 1):
            if place == first and behind <= skip:
                continue
            number += 1
            yield document, Position(epoch, place, behind, number)


def training_texts(job: Job) -> Iterator[str]:
    """Every document of the training split once, in the order of the first epoch, mixed by weight.

    Raises DataError.
    """
    sources = [_open_text(s, f"data.sources.{i}", "train") for i, s in enumerate(job.data.sources)]
    seed, shuffle = job.debug.seed, job.data.shuffle
    streams = [epoch_documents(source, Position(), seed=seed, shuffle=shuffle) for source in sources]
    return _mixed([(document for document, _ in stream) for stream in streams], sources)


def heldout_texts(job: Job) -> Iterator[str]:
    """The validation documents, in an order that depends on their files' names alone, mixed by weight.

    They are `validation.sources` (of one with a holdout only the held-out files), else the held-out files of
    `data.sources`. Raises DataError where there are none.
    """
    if job.validation.sources:
        named = [("validation.sources", i, s) for i, s in enumerate(job.validation.sources)]
    else:
        named = [("data.sources", i, s) for i, s in enumerate(job.data.sources) if s.holdout > 0]
    if not named:
        raise DataError(
            "data.sources: none keeps text for validation; "
            "set data.sources.N.holdout, or add [[validation.sources]]"
        )
    sources = [_open_text(s, f"{key}.{i}", "heldout" if s.holdout > 0 else "all") for key, i, s in named]
    return _mixed([_by_hash(source) for source in sources], sources)


def _by_hash(source: OpenSource) -> Iterator[Document]:
    def place(unit: int) -> int:
        file, part = source.locate(unit)
        return digest("heldout", file.name, part)

    for unit in sorted(range(source.num_units), key=place):
        yield from shuffled(source.documents(unit), place(unit))


def _open_text(settings: Source, key: str, split: Split) -> OpenSource:
    if settings.kind == "tokens":
        raise DataError(
            f'{key}: kind "tokens" holds no text; name the text it was packed from '
            "(for validation in [[validation.sources]], with the holdout it was packed with)"
        )
    return open_source(settings, key, split)


def _mixed(streams: Sequence[Iterator[Document]], sources: Sequence[OpenSource]) -> Iterator[str]:
    """All of the streams; next comes the one furthest behind its share of characters, as long as it lasts."""
    characters, weights = [0] * len(streams), [source.settings.weight for source in sources]
    alive = list(range(len(streams)))
    while alive:
        s = furthest_behind(characters, weights, alive)
        text = next(streams[s], None)
        if text is None:
            alive.remove(s)
            continue
        assert isinstance(text, str), sources[s].key
        characters[s] += len(text)
        yield text


def furthest_behind(given: Sequence[int], weights: Sequence[float], among: Sequence[int]) -> int:
    """The source `among` these that has given least for its weight; of equals the first."""
    return min(among, key=lambda s: given[s] / weights[s])
