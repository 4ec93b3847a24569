from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from nanovl.config.schema import Job, Source
from nanovl.data.documents import heldout_texts
from nanovl.data.loader import Loader, heldout_rows
from nanovl.errors import ConfigError, DataError
from nanovl.spec import IGNORE_INDEX, Batch
from nanovl.tokenizer.bpe import Tokenizer

TEXTS = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(3 + i * 5 % 40)) for i in range(40)]


def rows_of(batches: list[Batch]) -> list[list[list[float]]]:
    """Every row as the lists of its five tensors."""
    return [[value[i].tolist() for value in b.values()] for b in batches for i in range(len(b["tokens_BT"]))]


def global_rows(loaders: list[Loader]) -> list[list[list[float]]]:
    """One step's rows of all ranks, in the order of the lanes."""
    per_rank = [rows_of(loader.next_step()) for loader in loaders]
    return [row for together in zip(*per_rank, strict=True) for row in together]


def loaders_of(job: Job, tokenizer: object, degree: int) -> list[Loader]:
    return [Loader(job, tokenizer, rank=rank, degree=degree) for rank in range(degree)]  # type: ignore[arg-type]


def states_of(loaders: list[Loader]) -> list[dict[str, object]]:
    """As a checkpoint keeps them."""
    return [json.loads(json.dumps(loader.state_dict())) for loader in loaders]


def test_batches_keep_the_contract(make_job, write_jsonl, byte_tokenizer):
    job = make_job(write_jsonl(TEXTS), seq_len=32, local_batch_size=2, global_batch_size=8)
    batches = Loader(job, byte_tokenizer, rank=1, degree=2).next_step()
    assert len(batches) == 2
    for batch in batches:
        assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
            "tokens_BT": ((2, 32), torch.int64),
            "targets_BT": ((2, 32), torch.int64),
            "positions_BT": ((2, 32), torch.int64),
            "doc_ids_BT": ((2, 32), torch.int64),
            "weights_BT": ((2, 32), torch.float32),
        }
        assert (batch["tokens_BT"][:, 0] == 256).all()  # best_fit: every row begins with a document


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("units", ["documents", "files"])
def test_the_global_batch_is_the_same_for_every_degree(
    make_job, write_jsonl, write_texts, byte_tokenizer, packing, units
):
    source = write_jsonl(TEXTS) if units == "documents" else write_texts(TEXTS)
    job = make_job(source, packing=packing, global_batch_size=8)
    steps = []
    for degree, local in ((1, 8), (1, 2), (2, 2), (4, 1)):
        job.training.local_batch_size = local
        loaders = loaders_of(job, byte_tokenizer, degree)
        steps.append([global_rows(loaders) for _ in range(12)])
    assert steps[0] == steps[1] == steps[2] == steps[3]
    assert steps[0][0] != steps[0][1]


def test_every_document_once_an_epoch(make_job, write_jsonl, byte_tokenizer):
    job = make_job(
        write_jsonl([f"{i:02d}" for i in range(40)]), seq_len=30, packing="concat", global_batch_size=4
    )
    loader = Loader(job, byte_tokenizer, rank=0, degree=1)
    # 10 documents of 3 tokens a lane and epoch: 30 tokens a row
    for _ in range(3):
        rows = rows_of(loader.next_step())
        seen = byte_tokenizer.decode([t for row in rows for t in row[0]])
        assert sorted(seen[i : i + 2] for i in range(0, 80, 2)) == [f"{i:02d}" for i in range(40)]
    assert loader.stats()["epoch"] == 3  # the next row's first token is a target already


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_is_exact_on_any_number_of_ranks(
    make_job, write_jsonl, write_texts, byte_tokenizer, packing, prefetch
):
    sources = [write_jsonl(TEXTS, weight=2.0), write_texts(TEXTS)]
    job = make_job(*sources, packing=packing, prefetch_batches=prefetch, buffer_documents=5)
    loaders = loaders_of(job, byte_tokenizer, 2)
    for _ in range(7):
        global_rows(loaders)
    states = states_of(loaders)
    expected = [global_rows(loaders) for _ in range(9)]
    for degree in (1, 2, 4):
        resumed = loaders_of(job, byte_tokenizer, degree)
        for loader in resumed:
            loader.load_state_dict(states)
            assert loader.stats()["tokens"] == 0
        assert [global_rows(resumed) for _ in range(4)] == expected[:4]
        again = loaders_of(job, byte_tokenizer, 1)
        again[0].load_state_dict(states_of(resumed))
        assert [global_rows(again) for _ in range(5)] == expected[4:]
        for loader in [*resumed, *again]:
            loader.close()


def test_a_state_from_before_the_first_step_is_the_beginning(make_job, write_jsonl, byte_tokenizer):
    job = make_job(write_jsonl(TEXTS), prefetch_batches=2)
    loaders = loaders_of(job, byte_tokenizer, 1)
    states = states_of(loaders)
    expected = [global_rows(loaders) for _ in range(3)]
    loaders[0].load_state_dict(states)
    assert [global_rows(loaders) for _ in range(3)] == expected
    loaders[0].close()


def test_a_state_made_for_other_rows_is_refused(tmp_path, make_job, write_jsonl, byte_tokenizer):
    source = write_jsonl(TEXTS, weight=2.0)
    state = states_of(loaders_of(make_job(source), byte_tokenizer, 1))
    for settings, message in (
        ({"global_batch_size": 8}, "training.global_batch_size is 8, the checkpoint's data was read with 4"),
        ({"seq_len": 16}, "training.seq_len is 16, .* with 32; set it back, or start a fresh run"),
        ({"packing": "concat"}, "data.packing is concat, .* with best_fit"),
        ({"overflow": "pad"}, "data.overflow is pad, .* with crop"),
        ({"buffer_documents": 9}, "data.buffer_documents is 9, .* with 64"),
        ({"shuffle": False}, "data.shuffle is False, .* with True"),
    ):
        with pytest.raises(DataError, match=rf"--resume: {message}"):
            Loader(make_job(source, **settings), byte_tokenizer, rank=0, degree=1).load_state_dict(state)
    job = make_job(source)
    job.debug.seed = 8
    with pytest.raises(DataError, match=r"debug.seed is 8, .* with 7"):
        Loader(job, byte_tokenizer, rank=0, degree=1).load_state_dict(state)
    job = make_job(Source(kind="jsonl", path=source.path, weight=1.0))
    with pytest.raises(DataError, match=r"data.sources.0.weight is 1.0, .* with 2.0"):
        Loader(job, byte_tokenizer, rank=0, degree=1).load_state_dict(state)
    with pytest.raises(DataError, match=r"data.sources is 2, .* with 1"):
        Loader(make_job(source, source), byte_tokenizer, rank=0, degree=1).load_state_dict(state)
    other = type("Other", (type(byte_tokenizer),), {"hash": lambda self: "other"})()
    with pytest.raises(DataError, match=r"tokenizer is other, .* with bytes"):
        Loader(make_job(source), other, rank=0, degree=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "003.txt").unlink(), "003.txt is gone"),
        (
            lambda folder: (folder / "003.txt").write_text("0" * 1234),
            "003.txt had 18 bytes and now has 1,234",
        ),
        (lambda folder: (folder / "new.txt").write_text("x"), "new.txt is new"),
    ],
)
def test_files_that_changed_since_the_checkpoint_are_named(
    tmp_path, make_job, write_texts, byte_tokenizer, change, message
):
    job = make_job(write_texts(TEXTS))
    states = states_of(loaders_of(job, byte_tokenizer, 2))
    change(tmp_path / "texts")
    for rank in (0, 1):
        loader = Loader(job, byte_tokenizer, rank=rank, degree=2)
        with pytest.raises(
            DataError,
            match=rf"--resume: data.sources.0 \(.*texts\): {message} since the checkpoint was written; put",
        ):
            loader.load_state_dict(states)


def test_a_state_that_lacks_lanes_is_refused(make_job, write_jsonl, byte_tokenizer):
    job = make_job(write_jsonl(TEXTS))
    states = states_of(loaders_of(job, byte_tokenizer, 2))
    loader = Loader(job, byte_tokenizer, rank=0, degree=1)
    with pytest.raises(
        DataError, match=r"the data state lacks 2 of 4 rows, such as row 1; give the states of all"
    ):
        loader.load_state_dict(states[:1])


def test_a_file_that_vanishes_in_the_background_reaches_the_trainer(
    tmp_path, make_job, write_texts, byte_tokenizer
):
    job = make_job(write_texts(TEXTS), prefetch_batches=1, shuffle=False)
    loader = Loader(job, byte_tokenizer, rank=0, degree=1)
    (tmp_path / "texts" / "038.txt").unlink()

    def until_it_fails() -> None:
        for _ in range(200):
            loader.next_step()

    with pytest.raises(DataError, match=r"038.txt: No such file or directory"):
        until_it_fails()
    loader.close()
    loader.close()


def test_rows_that_do_not_divide_and_tokenizers_without_a_first_token(make_job, write_jsonl, byte_tokenizer):
    job = make_job(write_jsonl(TEXTS), local_batch_size=3, global_batch_size=0)
    with pytest.raises(
        ConfigError, match=r"training.global_batch_size = 8 is no multiple of 2 data ranks x 3 rows = 6"
    ):
        Loader(job, byte_tokenizer, rank=0, degree=2, global_rows=8)
    with pytest.raises(ConfigError, match=r"training.global_batch_size = 0 is no multiple"):
        Loader(job, byte_tokenizer, rank=0, degree=1)
    none = type("NoBos", (type(byte_tokenizer),), {"bos_id": None})()
    with pytest.raises(ConfigError, match=r"no token that begins a document; name one as bos_token"):
        Loader(job, none, rank=0, degree=1, global_rows=3)


def test_stats_by_hand(make_job, write_jsonl, byte_tokenizer):
    # documents of 5 tokens in rows of 12 slots
    job = make_job(write_jsonl(["abcd"] * 8), seq_len=11, global_batch_size=2, buffer_documents=2)
    loader = Loader(job, byte_tokenizer, rank=0, degree=1)
    loader.next_step()
    stats = loader.stats()
    # 5 + 5 + 2, and 3 cropped, in each of two rows: 11 targets; 2 documents wait at first, one comes for each taken
    assert (stats["documents"], stats["tokens"], stats["utilisation"]) == (8, 22, 1.0)
    assert stats["cropped"] == 6 / 28
    assert stats["wait_seconds"] > 0
    assert stats["tokens_per_second"] > 0
    assert loader.stats()["documents"] == 0
    job.data.overflow = "pad"
    loader = Loader(job, byte_tokenizer, rank=0, degree=1)
    loader.next_step()
    stats = loader.stats()
    # 5 + 5 slots, 9 targets of 11
    assert (stats["documents"], stats["tokens"], stats["utilisation"], stats["cropped"]) == (
        8,
        18,
        18 / 22,
        0,
    )


def test_cross_document_attention_reaches_the_batches(make_job, write_jsonl, byte_tokenizer):
    job = make_job(write_jsonl(TEXTS), cross_document_attention=True)
    (batch, *_) = Loader(job, byte_tokenizer, rank=0, degree=1).next_step()
    assert batch["doc_ids_BT"].tolist() == [[0] * 32]
    assert batch["positions_BT"].tolist() == [list(range(32))]


def test_the_thread_does_not_keep_a_process_alive(tmp_path: Path, write_jsonl):
    source = write_jsonl(TEXTS)
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import ByteTokenizer
from nanovl.config.schema import Data, Job, Source, Training
from nanovl.data.loader import Loader
job = Job(data=Data(sources=[Source(kind="jsonl", path={source.path!r})]),
          training=Training(seq_len=32, local_batch_size=1, global_batch_size=4))
loader = Loader(job, ByteTokenizer(), rank=0, degree=1)
loader.next_step()
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("local", [1, 4])
def test_heldout_rows_cover_every_byte_once(byte_tokenizer, degree, local):
    taken = [heldout_rows(iter(TEXTS), byte_tokenizer, 17, 0, rank, degree, local) for rank in range(degree)]
    assert {text for _, text in taken} == {"".join(TEXTS).encode()}
    assert len({len(batches) for batches, _ in taken}) == 1
    assert all(batch["tokens_BT"].shape == (local, 17) for batches, _ in taken for batch in batches)
    targets: Counter[int] = Counter()
    for batches, _ in taken:
        for batch in batches:
            assert ((batch["weights_BT"] > 0) == (batch["targets_BT"] != IGNORE_INDEX)).all()
            targets.update(batch["targets_BT"][batch["weights_BT"] > 0].tolist())
    assert targets == Counter("".join(TEXTS).encode()) + Counter({256: len(TEXTS) - 1})


def test_heldout_rows_are_dealt_out_in_turns(byte_tokenizer):
    whole = rows_of(heldout_rows(TEXTS, byte_tokenizer, 16, 0, 0, 1, 1)[0])
    halves = [rows_of(heldout_rows(TEXTS, byte_tokenizer, 16, 0, rank, 2, 1)[0]) for rank in (0, 1)]
    for rank in (0, 1):
        mine = whole[rank::2]
        assert halves[rank][: len(mine)] == mine


def test_heldout_rows_take_whole_documents_up_to_the_limit(byte_tokenizer):
    texts = ["a" * 10, "\u00e9" * 10, "c" * 10]
    assert heldout_rows(texts, byte_tokenizer, 8, 5, 0, 1, 1)[1] == b"a" * 10
    assert heldout_rows(texts, byte_tokenizer, 8, 10, 0, 1, 1)[1] == b"a" * 10
    assert heldout_rows(texts, byte_tokenizer, 8, 11, 0, 1, 1)[1] == ("a" * 10 + "\u00e9" * 10).encode()
    with pytest.raises(
        DataError, match=r"the held-out files hold no text; name others in \[\[validation.sources\]\]"
    ):
        heldout_rows([], byte_tokenizer, 8, 0, 0, 1, 1)


def test_heldout_bytes_are_those_of_the_real_tokenizer(make_job, corpus, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    job = make_job(Source(kind="text", path=str(corpus), holdout=0.2))
    batches, text = heldout_rows(heldout_texts(job), tokenizer, 64, 30_000, 0, 1, 4)
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    counted = sum(int(token_bytes[b["targets_BT"][b["weights_BT"] > 0]].sum()) for b in batches)
    assert counted == len(text) >= 30_000
