from __future__ import annotations

import numpy as np
import pytest

from nanovl.config.schema import Source, Validation
from nanovl.data.documents import Position, epoch_documents, furthest_behind, heldout_texts, training_texts
from nanovl.data.shards import write_shard
from nanovl.data.sources import open_source
from nanovl.errors import DataError


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(write_texts):
    source = open_source(write_texts([f"t{i}" for i in range(30)]), "data.sources.0", "train")
    epochs = [
        [document for document, _ in epoch_documents(source, Position(epoch), seed=1, shuffle=True)]
        for epoch in (0, 1, 0)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"t{i}" for i in range(30))
    assert epochs[0] == epochs[2] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_documents_of_one_file_are_shuffled_too(write_jsonl):
    source = open_source(write_jsonl([f"t{i:02d}" for i in range(50)]), "data.sources.0", "train")
    assert source.num_units == 1
    shuffled = [d for d, _ in epoch_documents(source, Position(), seed=1, shuffle=True)]
    assert shuffled != sorted(shuffled) == [f"t{i:02d}" for i in range(50)]
    in_order = [d for d, _ in epoch_documents(source, Position(), seed=1, shuffle=False)]
    assert in_order == sorted(shuffled)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_goes_on_from_every_position(tmp_path, write_jsonl, shuffle):
    write_jsonl(["a", "b", "c"], "0.jsonl")
    write_jsonl(["d"], "1.jsonl")
    write_jsonl(["e", "", "f"], "2.jsonl")
    source = open_source(Source(kind="jsonl", path=str(tmp_path)), "data.sources.0", "train")
    whole = list(epoch_documents(source, Position(epoch=3), seed=1, shuffle=shuffle))
    assert [position.number for _, position in whole] == [1, 2, 3, 4, 5, 6]
    for i, (_, position) in enumerate(whole):
        assert list(epoch_documents(source, position, seed=1, shuffle=shuffle)) == whole[i + 1 :]


def test_lanes_of_an_epoch_share_the_units(write_texts):
    source = open_source(write_texts([f"t{i}" for i in range(10)]), "data.sources.0", "train")
    lanes = [
        [d for d, _ in epoch_documents(source, Position(), seed=1, shuffle=True, lane=lane, lanes=3)]
        for lane in range(3)
    ]
    whole = [d for d, _ in epoch_documents(source, Position(), seed=1, shuffle=True)]
    assert lanes == [whole[0::3], whole[1::3], whole[2::3]]


def test_furthest_behind_by_hand():
    assert furthest_behind([0, 0], [1, 1], [0, 1]) == 0
    assert furthest_behind([10, 4], [2.5, 1], [0, 1]) == 0  # 4 and 4: the first
    assert furthest_behind([11, 4], [2.5, 1], [0, 1]) == 1
    assert furthest_behind([0, 9, 8], [1, 1, 1], [1, 2]) == 2


def test_training_texts_are_mixed_by_weight_until_each_source_ends(make_job, write_jsonl):
    a = write_jsonl(["aaaa"] * 6, "a.jsonl", weight=2.0)
    b = write_jsonl(["bb"] * 6, "b.jsonl", weight=1.0)
    texts = list(training_texts(make_job(a, b)))
    # shares 4/2 and 2/1 a document: turns, a first; every document once
    assert "".join(text[0] for text in texts) == "ab" * 6
    c = write_jsonl(["c"] * 2, "c.jsonl", weight=1.0)
    assert "".join(text[0] for text in training_texts(make_job(a, c))) == "accaaaaa"


def test_training_texts_leave_out_the_heldout_files(make_job, write_texts):
    job = make_job(write_texts([f"t{i}" for i in range(40)], holdout=0.3))
    training, heldout = list(training_texts(job)), list(heldout_texts(job))
    assert sorted(training + heldout) == sorted(f"t{i}" for i in range(40))
    assert len(heldout) > 5


def test_heldout_texts_keep_their_order_whatever_the_seed_and_the_other_files(
    tmp_path, make_job, write_texts
):
    job = make_job(write_texts([f"t{i:02d}" for i in range(60)], holdout=0.5))
    texts = list(heldout_texts(job))
    assert texts != sorted(texts)
    job.debug.seed = 99
    job.data.shuffle = False
    assert list(heldout_texts(job)) == texts
    for i in range(10):
        (tmp_path / "texts" / f"{i:03d}.txt").unlink()
    assert list(heldout_texts(job)) == [text for text in texts if int(text[1:]) >= 10]


def test_validation_sources_take_the_place_of_the_heldout_files(make_job, write_texts):
    job = make_job(write_texts(["t"] * 20, holdout=0.5))
    other = write_texts([f"v{i}" for i in range(20)], folder="other")
    job.validation = Validation(sources=[other])
    assert sorted(heldout_texts(job)) == sorted(f"v{i}" for i in range(20))
    other.holdout = 0.5
    assert 0 < len(list(heldout_texts(job))) < 20


def test_no_text_to_validate_on(make_job, write_texts):
    with pytest.raises(
        DataError, match=r"data.sources: none keeps text for validation; set data.sources.N.holdout"
    ):
        heldout_texts(make_job(write_texts(["t"])))


def test_packed_tokens_are_no_text(tmp_path, make_job):
    write_shard(tmp_path / "a.safetensors", [np.array([1])], "bytes", 257)
    source = Source(kind="tokens", path=str(tmp_path), holdout=0.5)
    for texts in (training_texts, heldout_texts):
        with pytest.raises(
            DataError, match=r'data.sources.0: kind "tokens" holds no text; name the text it was'
        ):
            list(texts(make_job(source)))
