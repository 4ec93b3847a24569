"""Documents -> rows of seq_len + 1 token slots -> tokens, targets, positions, document ids, loss weights.

A document is the token that begins it and its text; a piece is as much of it as stands in one row. The target
of a document's last token is the first token of the next: that is how a model learns to stop.

`best_fit` (Ding et al. 2024, arXiv:2404.10830, with the cropping of nanochat): a row begins with a document
and takes, again and again, the largest of the waiting documents that fits. `concat`: one stream, cut every
seq_len tokens; rows overlap by one token, so that every token but the stream's first is a target once. A
document that the cut divides goes on in the next row at position 0, without sight of what came before.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovl.spec import IGNORE_INDEX

Tokens = NDArray[np.int32]


class Row(NamedTuple):
    """One row's pieces in order, and what it took to fill it."""

    pieces: list[Tokens]
    documents: int
    """Documents read to fill it."""
    cropped: int
    """Tokens thrown away."""


def best_fit_row(
    waiting: list[Tokens],
    pull: Callable[[], Tokens],
    slots: int,
    buffer_documents: int,
    overflow: Literal["crop", "pad", "split"],
    bos: Tokens,
) -> Row:
    """Take a row out of `waiting`, which is sorted by length and filled up to `buffer_documents` from `pull`.

    Every pick costs O(log n) comparisons. Where nothing fits, the shortest document fills the row and its rest
    is thrown away (`crop`) or waits on, behind a `bos` of its own (`split`), or the row stays short (`pad`).
    A document longer than the row so fills one; except with `split` its end is lost already when it comes in,
    so that it never clogs the buffer. Of equal lengths, and of all that fill a row, the one that waited
    longest goes first: with `split`, long documents take turns.
    """

    def length(document: Tokens) -> int:
        return min(len(document), slots)

    pieces: list[Tokens] = []
    left, documents, cropped = slots, 0, 0
    while left > 0:
        while len(waiting) < buffer_documents:
            document = pull()
            documents += 1
            if len(document) > slots and overflow != "split":
                cropped += len(document) - slots
                document = document[:slots].copy()  # a view would keep the whole document in memory
            insort(waiting, document, key=length)
        fits = bisect_right(waiting, left, key=length)
        if fits == 0 and overflow == "pad":
            break
        # with nothing that fits, the shortest stands first
        pick = bisect_left(waiting, length(waiting[fits - 1]), key=length) if fits else 0
        document = waiting.pop(pick)
        piece, rest = document[:left], document[left:]
        pieces.append(piece)
        left -= len(piece)
        if len(rest) and overflow == "split":
            insort(waiting, np.concatenate((bos, rest)), key=length)
        else:
            cropped += len(rest)
    return Row(pieces, documents, cropped)


def concat_row(rest: list[Tokens], pull: Callable[[], Tokens | None], slots: int) -> Row:
    """Take one row off the stream; `rest` holds what earlier rows left over, and then what this one leaves.

    `pull` may end the stream with None: the last row is then shorter than `slots`, and `rest` is empty.
    """
    pieces, documents = list(rest), 0
    used = sum(map(len, pieces))
    rest.clear()
    while used < slots:
        document = pull()
        if document is None:
            return Row(pieces, documents, 0)
        pieces.append(document)
        documents += 1
        used += len(document)
    keep = len(pieces[-1]) - (used - slots)
    rest.append(pieces[-1][keep - 1 :])  # the last slot is only a target here: the next row begins with it
    pieces[-1] = pieces[-1][:keep]
    return Row(pieces, documents, 0)


def row_arrays(
    pieces: Sequence[Tokens], seq_len: int, pad_token: int, cross_document_attention: bool = False
) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
    """The five arrays [seq_len] of a row.

    Slots without a piece carry `pad_token`, no loss, and a document id of their own. With
    `cross_document_attention` the row counts as one document: ids 0, positions 0 to seq_len - 1.
    """
    lengths = [len(piece) for piece in pieces]
    used = sum(lengths)
    slots = np.full(seq_len + 1, pad_token, dtype=np.int64)
    if pieces:
        slots[:used] = np.concatenate(pieces)
    targets = slots[1:].copy()
    targets[max(used - 1, 0) :] = IGNORE_INDEX
    places = np.arange(seq_len)
    if cross_document_attention:
        doc_ids, positions = np.zeros(seq_len, dtype=np.int64), places
    else:
        starts = np.cumsum([0, *lengths])
        doc_ids = np.repeat(np.arange(len(pieces) + 1), [*lengths, seq_len + 1 - used])[:seq_len]
        positions = places - starts[doc_ids]
    return {
        "tokens_BT": slots[:-1],
        "targets_BT": targets,
        "positions_BT": positions,
        "doc_ids_BT": doc_ids,
        "weights_BT": (targets != IGNORE_INDEX).astype(np.float32),
    }
