from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovl.data.pack import Tokens, best_fit_row, concat_row, row_arrays
from nanovl.spec import IGNORE_INDEX

BOS = np.array([-1], dtype=np.int32)
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def documents(*lengths: int) -> list[Tokens]:
    """Document i is 100 i, 100 i + 1, ..."""
    return [np.arange(length, dtype=np.int32) + 100 * i for i, length in enumerate(lengths)]


def puller(given: list[Tokens]) -> Callable[[], Tokens]:
    return iter(given).__next__


def test_best_fit_takes_the_largest_that_fits():
    pull, waiting = puller(documents(6, 5, 3, 4, 9, 2, 2, 2)), []
    row = best_fit_row(waiting, pull, 10, 4, "crop", BOS)
    # of 6 5 3 4 the 6; 4 slots are left, 9 has come in: of 3 4 5 9 the 4
    assert [p.tolist() for p in row.pieces] == [[0, 1, 2, 3, 4, 5], [300, 301, 302, 303]]
    assert [len(d) for d in waiting] == [3, 5, 9]
    assert (row.documents, row.cropped) == (5, 0)


def test_best_fit_crops_the_shortest_where_nothing_fits():
    pull, waiting = puller(documents(7, 8, 6, 9, 9)), []
    row = best_fit_row(waiting, pull, 10, 3, "crop", BOS)
    # 8 fits; 2 slots are left, and of 6 7 9 the 6 loses 4 tokens
    assert [p.tolist() for p in row.pieces] == [[100, 101, 102, 103, 104, 105, 106, 107], [200, 201]]
    assert (row.documents, row.cropped) == (4, 4)
    assert [len(d) for d in waiting] == [7, 9]


def test_best_fit_pads_where_nothing_fits():
    pull, waiting = puller(documents(7, 8, 6, 9)), []
    row = best_fit_row(waiting, pull, 10, 3, "pad", BOS)
    assert [len(p) for p in row.pieces] == [8]
    assert [len(d) for d in waiting] == [6, 7, 9]
    assert (row.documents, row.cropped) == (4, 0)


@pytest.mark.parametrize("overflow", ["crop", "pad"])
def test_a_document_longer_than_the_row_fills_one_and_does_not_clog(overflow):
    pull, waiting = puller(documents(25, 3, 24, 3, 3)), []
    row = best_fit_row(waiting, pull, 10, 3, overflow, BOS)
    assert [p.tolist() for p in row.pieces] == [list(range(10))]
    assert row.cropped == 15 + 14
    assert [len(d) for d in waiting] == [3, 10]
    assert waiting[1].base is None  # no view that keeps all of a long document in memory


def test_split_keeps_the_rest_behind_a_bos_and_long_documents_take_turns():
    pull, waiting = puller(documents(12, 9, 3, 2, 2, 2, 2, 2)), []
    rows = [best_fit_row(waiting, pull, 5, 3, "split", BOS) for _ in range(4)]
    found = [[p.tolist() for p in row.pieces] for row in rows]
    # 12 and 9 both fill a row: the first that came, then the other, then the first's rest
    assert found[0] == [[0, 1, 2, 3, 4]]
    assert found[1] == [[100, 101, 102, 103, 104]]
    assert found[2] == [[-1, 5, 6, 7, 8]]
    assert found[3] == [[-1, 105, 106, 107, 108]]
    assert sum(row.cropped for row in rows) == 0


@given(LENGTHS, st.integers(3, 20), st.integers(1, 8))
def test_split_loses_no_token_and_repeats_none(lengths, slots, buffer):
    given_documents = documents(*lengths)
    pull, waiting, taken = puller(given_documents), [], []
    try:
        while True:
            row = best_fit_row(waiting, pull, slots, buffer, "split", BOS)
            assert sum(map(len, row.pieces)) == slots
            taken += [token for piece in row.pieces for token in piece.tolist() if token >= 0]
    except StopIteration:
        pass
    left = [token for piece in waiting for token in piece.tolist() if token >= 0]
    everything = np.concatenate(given_documents).tolist()
    # pieces of the row under way when documents ran out are in neither list
    assert not set(taken) & set(left)
    assert set(taken) | set(left) <= set(everything)
    assert len(taken) == len(set(taken))
    assert len(everything) - len(taken) - len(left) < slots


def test_of_equal_lengths_the_first_that_came_goes_first():
    pull, waiting = puller(documents(5, 5, 5, 5, 5, 5)), []
    rows = [best_fit_row(waiting, pull, 5, 3, "crop", BOS) for _ in range(3)]
    assert [row.pieces[0][0] for row in rows] == [0, 100, 200]


def test_concat_overlaps_by_one_token_and_restarts_positions():
    rest: list[Tokens] = []
    pull = puller(documents(4, 6, 3, 9))
    first, second, third = (concat_row(rest, pull, 6) for _ in range(3))
    assert [p.tolist() for p in first.pieces] == [[0, 1, 2, 3], [100, 101]]
    assert [p.tolist() for p in second.pieces] == [[101, 102, 103, 104, 105], [200]]
    assert [p.tolist() for p in third.pieces] == [[200, 201, 202], [300, 301, 302]]
    assert [row.documents for row in (first, second, third)] == [2, 1, 1]
    assert row_arrays(second.pieces, 5, 9)["positions_BT"].tolist() == [0, 1, 2, 3, 4]


def test_concat_where_a_document_ends_with_the_row():
    rest: list[Tokens] = []
    pull = puller(documents(6, 6))
    assert [p.tolist() for p in concat_row(rest, pull, 6).pieces] == [[0, 1, 2, 3, 4, 5]]
    row = concat_row(rest, pull, 6)
    assert [p.tolist() for p in row.pieces] == [[5], [100, 101, 102, 103, 104]]
    arrays = row_arrays(row.pieces, 5, 9)
    assert arrays["targets_BT"].tolist() == [
        100,
        101,
        102,
        103,
        104,
    ]  # the end of a document predicts the next
    assert arrays["doc_ids_BT"].tolist() == [0, 1, 1, 1, 1]
    assert arrays["positions_BT"].tolist() == [0, 0, 1, 2, 3]


def test_a_stream_that_ends_leaves_a_short_row():
    rest: list[Tokens] = []
    stream = iter([*documents(4), None, None])
    assert [p.tolist() for p in concat_row(rest, lambda: next(stream), 6).pieces] == [[0, 1, 2, 3]]
    assert concat_row(rest, lambda: next(stream), 6).pieces == []


def test_row_arrays_by_hand():
    arrays = row_arrays(documents(3, 2), 6, pad_token=99)
    assert arrays["tokens_BT"].tolist() == [0, 1, 2, 100, 101, 99]
    assert arrays["targets_BT"].tolist() == [1, 2, 100, 101, IGNORE_INDEX, IGNORE_INDEX]
    assert arrays["positions_BT"].tolist() == [0, 1, 2, 0, 1, 0]
    assert arrays["doc_ids_BT"].tolist() == [0, 0, 0, 1, 1, 2]
    assert arrays["weights_BT"].tolist() == [1, 1, 1, 1, 0, 0]
    assert {str(a.dtype) for a in arrays.values()} == {"int64", "float32"}
    assert arrays["weights_BT"].dtype == np.float32


def test_a_full_row_has_a_loss_everywhere_and_one_slot_short_loses_only_the_last():
    assert row_arrays(documents(7), 6, 99)["weights_BT"].sum() == 6
    short = row_arrays(documents(6), 6, 99)
    assert short["tokens_BT"].tolist() == [0, 1, 2, 3, 4, 5]
    assert short["targets_BT"].tolist() == [1, 2, 3, 4, 5, IGNORE_INDEX]


def test_a_row_without_pieces_is_all_padding():
    arrays = row_arrays([], 3, 99)
    assert arrays["tokens_BT"].tolist() == [99, 99, 99]
    assert arrays["targets_BT"].tolist() == [IGNORE_INDEX] * 3
    assert arrays["positions_BT"].tolist() == [0, 1, 2]
    assert arrays["weights_BT"].sum() == 0


def test_cross_document_attention_makes_one_document_of_a_row():
    arrays = row_arrays(documents(3, 2), 6, 99, cross_document_attention=True)
    assert arrays["doc_ids_BT"].tolist() == [0] * 6
    assert arrays["positions_BT"].tolist() == [0, 1, 2, 3, 4, 5]
    assert arrays["targets_BT"].tolist() == row_arrays(documents(3, 2), 6, 99)["targets_BT"].tolist()


def naive_best_fit(
    lengths: list[int], slots: int, buffer: int, overflow: str
) -> Iterator[list[tuple[int, int]]]:
    """Rows as (document, tokens taken), by looking at every waiting document for every pick."""
    waiting: list[tuple[int, int]] = []
    incoming = iter(enumerate(lengths))
    while True:
        row, left = [], slots
        while left:
            while len(waiting) < buffer:
                try:
                    number, length = next(incoming)
                except StopIteration:
                    return
                waiting.append((number, min(length, slots)))
            fitting = [d for d in waiting if d[1] <= left]
            if not fitting and overflow == "pad":
                break
            if fitting:
                best = max(fitting, key=lambda d: d[1])  # max and min give the first of equals
            else:
                best = min(waiting, key=lambda d: d[1])
            waiting.remove(best)
            row.append((best[0], min(best[1], left)))
            left -= row[-1][1]
        yield row


@given(LENGTHS, st.integers(2, 20), st.integers(1, 8), st.sampled_from(["crop", "pad"]))
def test_best_fit_equals_the_naive_search(lengths, slots, buffer, overflow):
    pull, waiting, rows = puller(documents(*lengths)), [], []
    try:
        while True:
            rows.append(best_fit_row(waiting, pull, slots, buffer, overflow, BOS))
    except StopIteration:
        pass
    found = [[(int(p[0]) // 100, len(p)) for p in row.pieces] for row in rows]
    assert found == list(naive_best_fit(lengths, slots, buffer, overflow))
    for row in rows:
        assert all(p[0] % 100 == 0 for p in row.pieces)  # every piece is the beginning of a document
        assert sum(map(len, row.pieces)) <= slots
        assert overflow == "pad" or sum(map(len, row.pieces)) == slots


@given(LENGTHS, st.integers(2, 20))
def test_concat_makes_every_token_but_the_first_a_target_once(lengths, slots):
    given_documents = documents(*lengths)
    stream = iter([*given_documents, None, None])
    rest: list[Tokens] = []
    targets: list[int] = []
    while sum(map(len, (row := concat_row(rest, lambda: next(stream), slots)).pieces)) > 1:
        arrays = row_arrays(row.pieces, slots - 1, 99)
        targets += arrays["targets_BT"][arrays["weights_BT"] > 0].tolist()
    assert targets == np.concatenate(given_documents)[1:].tolist()


@given(LENGTHS, st.integers(1, 40))
def test_row_arrays_hold_together(lengths, seq_len):
    pieces, used = [], 0
    for document in documents(*lengths):
        pieces.append(document[: seq_len + 1 - used])
        used += len(pieces[-1])
        if used == seq_len + 1:
            break
    arrays = row_arrays(pieces, seq_len, 99)
    tokens, targets, ids, positions = (
        arrays[key] for key in ("tokens_BT", "targets_BT", "doc_ids_BT", "positions_BT")
    )
    counted = arrays["weights_BT"] > 0
    assert counted.sum() == used - 1
    assert (counted == (targets != IGNORE_INDEX)).all()
    assert (targets[:-1][counted[:-1]] == tokens[1:][counted[:-1]]).all()
    assert (positions[1:] == np.where(ids[1:] == ids[:-1], positions[:-1] + 1, 0)).all()
    assert (np.diff(ids) >= 0).all()
    assert positions[0] == ids[0] == 0
