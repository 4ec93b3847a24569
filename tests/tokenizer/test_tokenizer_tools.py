"""`nanovl tokenizer train` and `stats`, as a user types them."""

from __future__ import annotations

import gzip
import math
import re
import sys
from pathlib import Path

import pytest

from nanovl.cli import main as nanovl
from nanovl.config.load import load_job
from nanovl.data.documents import training_texts
from nanovl.errors import ConfigError, DataError
from nanovl.tokenizer.bpe import Tokenizer, load_tokenizer
from nanovl.tokenizer.train import train_tokenizer
from nanovl.tokenizer_tools import main


@pytest.fixture
def job_file(corpus: list[str], tmp_path: Path) -> Path:
    """A job over thirty files of text."""
    (tmp_path / "text").mkdir()
    for i, text in enumerate(corpus[:30]):
        (tmp_path / "text" / f"{i:02}.txt").write_text(text, encoding="utf-8", newline="")
    file = tmp_path / "job.toml"
    source = f'[[data.sources]]\nkind = "text"\npath = "{tmp_path / "text"}"\n'
    file.write_text(f"[tokenizer]\nvocab_size = 700\n[validation]\nfreq = 0\n{source}")
    return file


@pytest.mark.parametrize("trainer", ["rustbpe", "tokenizers"])
def test_train_learns_from_the_documents_of_the_job(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: str
) -> None:
    flags = [
        "--tokenizer.vocab_size=400",
        "--tokenizer.trainer",
        trainer,
        "--tokenizer.document_characters=2000",
    ]
    assert main(["train", "--config", str(job_file), *flags, "--out", str(tmp_path / "out")]) == 0

    documents = list(training_texts(load_job([job_file])))
    expected = train_tokenizer(
        documents, 400, trainer="rustbpe", max_characters=10**9, document_characters=2000
    )
    found = Tokenizer.load(tmp_path / "out")
    assert found.merges == expected.merges
    printed = capsys.readouterr().out
    seen = [text[:2000] for text in documents]
    num_bytes = sum(len(text.encode()) for text in seen)
    ratio = num_bytes / sum(len(found.encode(text)) for text in seen)
    assert "vocabulary  400 = 256 bytes + 135 merges + 9 special tokens\n" in printed
    assert f"text        {sum(map(len, seen)):,} characters in 30 documents\n" in printed
    assert re.search(rf"time        \d+\.\d s to read and to learn, with {trainer}\n", printed)
    assert f"compression {ratio:.3f} bytes a token on the first {num_bytes:,} bytes of that text\n" in printed
    assert f"saved       {tmp_path / 'out'}\n" in printed


def test_train_stops_at_train_characters(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--tokenizer.train_characters=5000", "--tokenizer.vocab_size=300"]
    main(["train", "--config", str(job_file), "--out", str(tmp_path / "out"), *limits])
    assert "text        5,000 characters in " in capsys.readouterr().out


def test_train_writes_nothing_where_it_cannot(job_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ["train", "--config", str(job_file), "--out", str(out)]
    with pytest.raises(
        ConfigError, match=r"tokenizer.path = 'x': this job has a tokenizer already; add --tokenizer.path="
    ):
        main([*call, "--tokenizer.path=x"])
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size = 90000: the text holds only"):
        main([*call, "--tokenizer.vocab_size=90000"])
    with pytest.raises(ConfigError, match=r"tokenizer.vocab: no such key"):
        main([*call, "--tokenizer.vocab=1"])
    with pytest.raises(ConfigError, match="--force: not a setting"):
        main([*call, "--force"])
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match=r"--out .*out: exists and is not an empty folder; name a new one"):
        main(call)
    assert [p.name for p in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("in_run", [False, True])
def test_stats_of_a_folder_and_of_a_run(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_run: bool
) -> None:
    tokenizer.save(tmp_path / "run" / "tokenizer")
    text = "Ça va? The tokenizer\r\n" * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    path = tmp_path / "run" if in_run else tmp_path / "run" / "tokenizer"
    assert main(["stats", str(path), "--text", str(tmp_path / "a.txt")]) == 0

    num_bytes, num_tokens = len(text.encode()), len(tokenizer.encode(text))
    lengths = [len(tokenizer.decode_bytes([i])) for i in range(1015)]
    bits = 10 * num_tokens / num_bytes  # log2 of 1024 ids
    packed = 8 * len(gzip.compress(text.encode(), 9)) / num_bytes
    assert capsys.readouterr().out.splitlines() == [
        "vocabulary  1,024, of which 9 special tokens",
        f"token bytes {sum(lengths) / 1015:.2f} on average, 1 to {max(lengths)}",
        f"text        {tmp_path / 'a.txt'}: {num_bytes:,} bytes, {num_tokens:,} tokens",
        f"compression {num_bytes / num_tokens:.3f} bytes a token",
        f"bits a byte {bits:.3f} with all tokens equally likely; gzip -9: {packed:.3f}",
    ]


def test_stats_without_a_text_reads_pythons_documentation(
    tokenizer: Tokenizer, folder: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from pydoc_data.topics import topics

    assert main(["stats", str(folder)]) == 0
    num_bytes = len("\n\n".join(topics.values()).encode())
    assert (
        f"text        Python's documentation (pydoc_data.topics): {num_bytes:,} bytes, "
        in capsys.readouterr().out
    )
    assert math.log2(load_tokenizer(folder).vocab_size) == 10


def test_stats_names_what_it_cannot_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"absent/tokenizer.json: no such file"):
        main(["stats", str(tmp_path / "absent")])
    with pytest.raises(
        ConfigError, match=r"--text .*absent: No such file or directory; name a readable file of text"
    ):
        main(["stats", str(folder), "--text", str(tmp_path / "absent")])
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"binary: byte 2 is not UTF-8 \(invalid start byte\); convert it"):
        main(["stats", str(folder), "--text", str(tmp_path / "binary")])
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match=r"empty: is empty; name a file with text in it"):
        main(["stats", str(folder), "--text", str(tmp_path / "empty")])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="this Python comes without its documentation; name a file"):
        main(["stats", str(folder)])


@pytest.mark.parametrize(
    "argv", [[], ["sort"], ["stats"], ["train"], ["stats", "x", "--force"], ["train", "--out", "x"]]
)
def test_a_wrong_command_line_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2
    assert "usage: nanovl tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "stats"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([verb, "--help"])
    assert raised.value.code == 0
    assert f"usage: nanovl tokenizer {verb}" in capsys.readouterr().out


def test_the_nanovl_command_gives_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nanovl(["tokenizer", "stats", str(tmp_path)]) == 2
    assert (
        f"nanovl tokenizer: config error\n  {tmp_path}/tokenizer.json: no such file"
        in capsys.readouterr().err
    )
