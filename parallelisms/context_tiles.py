"""The pieces in which a rank of a ring works through another rank's keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanovl.parallelisms.context_cut import SequenceCut, visible_between

# B batch, T query tokens, S key tokens or the whole row, D head channels, K key/value heads, G query heads a key head

QUERY_TILE = 512
"""Queries whose scores exist at a time; assumed, not measured."""


class Tile(NamedTuple):
    """Some queries of this rank and the keys of another's that one of them may see but for documents."""

    queries: slice
    """Among this rank's tokens."""
    keys: slice
    """Among the other's tokens."""
    query_places: slice
    """In the row."""
    key_places: slice
    """In the row."""


def tiles(cut: SequenceCut, owner: int, num_tokens: int, window: int | None) -> Iterator[Tile]:
    """What causality and window leave of this rank's queries and `owner`'s keys, `num_tokens` each."""
    size = num_tokens // len(cut.chunks)
    for i, query_chunk in enumerate(cut.chunks):
        for start in range(0, size, QUERY_TILE):
            tokens = min(QUERY_TILE, size - start)
            place = query_chunk * size + start
            first = 0 if window is None else place - window + 1
            for j, key_chunk in enumerate(cut.chunks_of(owner)):
                low, high = max(first, key_chunk * size), min(place + tokens, (key_chunk + 1) * size)
                if low < high:
                    shift = (j - key_chunk) * size  # from places in the row to the owner's tokens
                    yield Tile(
                        slice(i * size + start, i * size + start + tokens),
                        slice(low + shift, high + shift),
                        slice(place, place + tokens),
                        slice(low, high),
                    )


def capped_scores(
    tile: Tile,
    q_BKGTD: Tensor,
    k_BKSD: Tensor,
    doc_ids_BS: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Scores [B, K, G, T, S] of the tile's queries and keys, but for heat, and where a query may look,
    [B or 1, 1, 1, T, S]."""
    q, k = q_BKGTD[..., tile.queries, :], k_BKSD[:, :, tile.keys]
    score_BKGTS = torch.einsum("bkgtd,bksd->bkgts", q, k)
    if softcap is not None:
        score_BKGTS = softcap * torch.tanh(score_BKGTS / softcap)
    places = (tile.query_places, tile.key_places)
    place_T, place_S = (torch.arange(p.start, p.stop, device=q.device) for p in places)
    docs = [None if doc_ids_BS is None else doc_ids_BS[:, p] for p in places]
    return score_BKGTS, visible_between(place_T, place_S, window, *docs)[:, :, None]
