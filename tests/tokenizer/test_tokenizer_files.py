"""Reading and writing a tokenizer's folder, and every way in which a folder can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovl.errors import ConfigError
from nanovl.tokenizer.bpe import Tokenizer, load_tokenizer
from nanovl.tokenizer.files import BYTE_TO_CHAR, bytes_of, chars_of, write_files


def test_bytes_are_spelled_as_in_gpt2() -> None:
    assert chars_of(b"Hi \n\xc3\xa9") == "HiĠĊÃ©"
    assert len(set(BYTE_TO_CHAR.values())) == 256
    assert bytes_of(chars_of(bytes(range(256)))) == bytes(range(256))
    with pytest.raises(KeyError):
        bytes_of("漢")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"absent/tokenizer.json: no such file; copy the tokenizer's files there, or name a folder",
    ):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/tokenizer.json: no such file"):
        Tokenizer.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"tokenizer.json: not valid JSON \(.*\); copy it again"),
        (b"[1]", "tokenizer.json: holds a list, not an object"),
        (b"\xff", r"tokenizer.json: cannot be read \(.*\); name a folder with a readable one"),
        (b"{}", "tokenizer.json: its model is of type None; name a tokenizer whose model is of type 'BPE'"),
        (b'{"model": {"type": "WordPiece"}}', "tokenizer.json: its model is of type 'WordPiece'"),
        (
            b'{"model": {"type": "BPE"}}',
            r"tokenizer.json: the tokenizers library refuses it \(.*\); copy it again",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)


def test_files_replace_older_ones_and_leave_others(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tokenizer"
    write_files(folder, {"a": "1", "b": "é\n"})
    (folder / "other").write_text("kept")
    (tmp_path / "new" / "tokenizer.partial").mkdir()  # left by a process that was killed
    write_files(folder, {"a": "2"})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "a": b"2",
        "b": "é\n".encode(),
        "other": b"kept",
    }
    assert [p.name for p in folder.parent.iterdir()] == ["tokenizer"]
