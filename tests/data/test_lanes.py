from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from nanovl.config.schema import Source
from nanovl.data.documents import Position, epoch_documents
from nanovl.data.lanes import Feed, Lanes, LaneState, Plan
from nanovl.data.shards import write_shard
from nanovl.data.sources import OpenSource, open_source
from nanovl.errors import DataError


def plan(rows: int, seq_len: int = 7, packing: str = "concat", shuffle: bool = True) -> Plan:
    return Plan(rows, 7, shuffle, seq_len, packing, "crop", 4)  # type: ignore[arg-type]


def opened(source: Source, number: int = 0) -> OpenSource:
    return open_source(source, f"data.sources.{number}", "train", "bytes")


def one_epoch(feed: Feed, lane: int) -> list[str]:
    """The lane's documents of epoch 0."""
    texts = []
    while (item := feed.pull(lane))[1].epoch == 0:
        texts.append(str(item[0]))
    return texts


@pytest.mark.parametrize("by_document", [True, False])
def test_every_document_once_an_epoch_over_all_lanes(write_jsonl, write_texts, by_document):
    texts = [f"t{i}" for i in range(23)]
    source = opened(write_jsonl(texts) if by_document else write_texts(texts))
    feed = Feed(source, plan(rows=5), {lane: Position() for lane in range(5)})
    assert feed.by_document == by_document
    lanes = [one_epoch(feed, lane) for lane in (3, 0, 4, 1, 2)]
    assert Counter(text for lane in lanes for text in lane) == Counter(texts)
    assert sorted(map(len, lanes)) == [4, 4, 5, 5, 5]


def test_documents_are_dealt_out_in_turns(write_jsonl):
    source = opened(write_jsonl([f"t{i}" for i in range(7)]))
    feed = Feed(source, plan(rows=3), {lane: Position() for lane in range(3)})
    order = [document for document, _ in epoch_documents(source, Position(), seed=7, shuffle=True)]
    assert [one_epoch(feed, lane) for lane in range(3)] == [order[0::3], order[1::3], order[2::3]]


@pytest.mark.parametrize("by_document", [True, False])
def test_a_lane_is_the_same_whoever_owns_it_and_wherever_it_starts(write_jsonl, write_texts, by_document):
    texts = [f"t{i}" for i in range(23)]
    source = opened(write_jsonl(texts) if by_document else write_texts(texts))
    together = Feed(source, plan(rows=5), {lane: Position() for lane in range(5)})
    expected = {lane: [together.pull(lane) for _ in range(30)] for lane in range(5)}  # several epochs
    alone = Feed(source, plan(rows=5), {3: Position()})
    assert [alone.pull(3) for _ in range(30)] == expected[3]
    taken = {0: 0, 1: 11, 4: 17}  # documents each lane has had, over different epochs
    starts = {lane: expected[lane][n - 1][1] if n else Position() for lane, n in taken.items()}
    moved = Feed(source, plan(rows=5), starts)
    for lane in (4, 0, 1):
        n = taken[lane]
        assert [moved.pull(lane) for _ in range(30 - n)] == expected[lane][n:]


def test_each_lane_goes_to_its_next_epoch_alone(write_texts):
    feed = Feed(opened(write_texts(["t"] * 8)), plan(rows=2), {0: Position(), 1: Position()})
    epochs = [feed.pull(0)[1].epoch for _ in range(9)]
    assert epochs == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert feed.pull(1)[1].epoch == 0


def test_fewer_documents_than_rows(write_jsonl, byte_tokenizer):
    source = opened(write_jsonl(["a", "b", "", "c"]))
    with pytest.raises(
        DataError,
        match=r"data.sources.0: 3 documents are too few for the 4 rows .* set .*batch_size to 3 or less",
    ):
        Lanes([source], plan(rows=4), byte_tokenizer, {0: LaneState()})
    assert Lanes([source], plan(rows=3), byte_tokenizer, {0: LaneState()}).next_rows()


def test_a_source_of_empty_documents(tmp_path, write_jsonl):
    feed = Feed(opened(write_jsonl(["", ""])), plan(rows=1), {0: Position()})
    with pytest.raises(DataError, match=r"every document in the whole source is empty; name other text"):
        feed.pull(0)
    (tmp_path / "a.jsonl").unlink()
    for i in range(8):
        write_jsonl([""], f"{i}.jsonl")
    feed = Feed(opened(Source(kind="jsonl", path=str(tmp_path))), plan(rows=2), {1: Position()})
    with pytest.raises(DataError, match=r"every document in the share of row 1 is empty"):
        feed.pull(1)


def test_sources_are_mixed_by_their_share_of_tokens(write_jsonl, byte_tokenizer):
    # documents of 4 and 8 tokens with their first one, wanted 3 : 1
    a = opened(write_jsonl(["aaa"] * 8, "a.jsonl", weight=3.0))
    b = opened(write_jsonl(["bbbbbbb"] * 8, "b.jsonl", weight=1.0), 1)
    lanes = Lanes([a, b], plan(rows=1, seq_len=40), byte_tokenizer, {0: LaneState()})
    (row,) = lanes.next_rows()
    # tokens / weight: a 4/3 > b 0, b 8, then a until 24/3 = 8 is not below b's 8: of equals the first
    assert "".join(chr(piece[1]) for piece in row.pieces) == "abaaaaaab"
    assert lanes.state()[0].tokens == (28, 16)


def test_what_best_fit_cannot_use_of_a_long_document_is_not_counted_as_its_share(write_jsonl, byte_tokenizer):
    long = opened(write_jsonl(["a" * 1000] * 8, "a.jsonl"))
    short = opened(write_jsonl(["bbb"] * 8, "b.jsonl"), 1)
    lanes = Lanes([long, short], plan(1, seq_len=7, packing="best_fit"), byte_tokenizer, {0: LaneState()})
    used: Counter[str] = Counter()
    for _ in range(40):
        (row,) = lanes.next_rows()
        for piece in row.pieces:
            used[chr(piece[1])] += len(piece)
    assert abs(used["a"] - used["b"]) < 60  # within what the buffer holds, of 320


def test_lanes_go_on_from_their_state_as_json(write_jsonl, write_texts, byte_tokenizer):
    sources = [
        opened(write_jsonl(["x" * n for n in range(1, 30)])),
        opened(write_texts(["y" * n for n in range(1, 30)]), 1),
    ]
    for packing in ("best_fit", "concat"):
        lanes = Lanes(sources, plan(3, packing=packing), byte_tokenizer, {r: LaneState() for r in range(3)})
        for _ in range(17):
            lanes.next_rows()
        states = {
            r: LaneState.from_json(json.loads(json.dumps(state.to_json())))
            for r, state in lanes.state().items()
        }
        expected = [[[p.tolist() for p in row.pieces] for row in lanes.next_rows()] for _ in range(50)]
        again = Lanes(sources, plan(3, packing=packing), byte_tokenizer, states)
        assert [
            [[p.tolist() for p in row.pieces] for row in again.next_rows()] for _ in range(50)
        ] == expected


def test_packed_tokens_make_the_rows_that_their_text_makes(tmp_path, write_jsonl, byte_tokenizer):
    texts = ["x" * n + "y" for n in range(1, 20)]
    encoded = [np.array(ids, dtype=np.int32) for ids in byte_tokenizer.encode_batch(texts)]
    write_shard(tmp_path / "a.safetensors", encoded, "bytes", 257)
    rows = []
    for source in (write_jsonl(texts), Source(kind="tokens", path=str(tmp_path / "a.safetensors"))):
        lanes = Lanes([opened(source)], plan(2), byte_tokenizer, {0: LaneState(), 1: LaneState()})
        rows.append([[p.tolist() for p in row.pieces] for _ in range(60) for row in lanes.next_rows()])
    assert rows[0] == rows[1]
