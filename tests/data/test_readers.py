from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovl.config.schema import Source
from nanovl.data import readers
from nanovl.data.sources import OpenSource, open_source
from nanovl.errors import DataError


def opened(kind: str, path: Path, **settings: object) -> OpenSource:
    return open_source(Source(kind=kind, path=str(path), **settings), "data.sources.0", "all")  # type: ignore[arg-type]


def texts(source: OpenSource) -> list[object]:
    return [document for unit in range(source.num_units) for document in source.documents(unit)]


def write_parquet(path: Path, values: object, row_group_size: int = 1000, column: str = "text") -> Path:
    pq.write_table(pa.table({"id": pa.array(range(len(values))), column: values}), path, row_group_size)  # type: ignore[arg-type]
    return path


def test_text_is_one_document_a_file_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_bytes(b"two\r\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xff")
    (tmp_path / ".hidden").write_bytes(b"no")
    source = opened("text", tmp_path)
    assert [file.name for file in source.files] == ["a.txt", "b/x.md"]
    assert texts(source) == ["one \ufffd", "two\r\n"]


def test_text_of_a_single_file(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert texts(opened("text", tmp_path / "a.txt")) == ["one"]


def test_jsonl_is_entered_at_any_block_and_no_line_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "JSONL_BLOCK_BYTES", 64)
    lengths = [0, 5, 200, 40, 41, 42, 43, 64, 1, 2, 3, 300, 7]
    lines = [json.dumps({"text": f"{i}" + "x" * n}) for i, n in enumerate(lengths)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))  # no newline at the end
    source = opened("jsonl", tmp_path)
    assert source.num_units == -(-(tmp_path / "a.jsonl").stat().st_size // 64) > 10
    assert texts(source) == [f"{i}" + "x" * n for i, n in enumerate(lengths)]


def test_jsonl_lines_that_begin_anywhere_around_the_end_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "JSONL_BLOCK_BYTES", 32)
    for length in range(40):
        (tmp_path / "a.jsonl").write_text(
            f'{{"text": "{"1" * length}2"}}\n{{"text": "3"}}\n{{"text": "4"}}\n'
        )
        assert texts(opened("jsonl", tmp_path)) == ["1" * length + "2", "3", "4"]


def test_a_line_longer_than_many_blocks_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "JSONL_BLOCK_BYTES", 16)
    for length in range(60, 110):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "0"}}\n{{"text": "{"1" * length}"}}\n{{"text": "2"}}\n')
        assert texts(opened("jsonl", tmp_path)) == ["0", "1" * length, "2"]


def test_jsonl_gz_blank_lines_empty_texts_and_lone_surrogates(tmp_path):
    lines = ['{"body": "one"}', "", '{"body": ""}', '{"body": "\\ud800 two"}', '{"body": "\\ud83d\\ude00"}']
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    source = opened("jsonl", tmp_path, column="body")
    assert source.num_units == 1
    assert texts(source) == ["one", "\ufffd two", "\U0001f600"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3: not JSON: .*; mend or remove the line"),
        ("[1]", "line 3: a list where an object is wanted; mend"),
        ('{"body": "x", "id": 1}', "line 3: no key 'text', only body, id; set the source's column"),
        ("{}", "line 3: no key 'text', only none"),
        ('{"text": 5}', "line 3: 'text' is a number, not text; mend or remove"),
        ('{"text": null}', "line 3: 'text' is a null, not text"),
        ("[" * 100_000, "line 3: not JSON: .*recursion"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, message, name):
    raw = f'{{"text": "a"}}\n\n{line}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(DataError, match=rf"{name} {message}"):
        texts(opened("jsonl", tmp_path))


def test_the_number_of_a_wrong_line_counts_from_the_file_not_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "JSONL_BLOCK_BYTES", 32)
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 9 + "oops\n")
    with pytest.raises(DataError, match=r"a.jsonl line 10: not JSON"):
        texts(opened("jsonl", tmp_path))


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_broken_gzip(tmp_path, damage):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20] if damage == "cut" else b"no gzip")
    with pytest.raises(DataError, match=r"a.jsonl.gz: broken gzip: .*; download it again, or remove it"):
        texts(opened("jsonl", tmp_path))


def test_parquet_row_groups_are_units(tmp_path):
    write_parquet(tmp_path / "a.parquet", [f"a{i}" for i in range(10)], 4)
    write_parquet(tmp_path / "b.parquet", ["b0", "", "b2"], 4)
    source = opened("parquet", tmp_path)
    assert source.first_units == [0, 3, 4]
    assert list(source.documents(1)) == ["a4", "a5", "a6", "a7"]
    assert texts(source) == [*(f"a{i}" for i in range(10)), "b0", "b2"]


def test_parquet_dictionaries_and_large_strings_are_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", pa.array(["x", "y", "x"]).dictionary_encode())
    write_parquet(tmp_path / "b.parquet", pa.array(["z"], pa.large_string()))
    assert texts(opened("parquet", tmp_path)) == ["x", "y", "x", "z"]


def test_parquet_errors_at_the_start(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", ["x"], column="body")
    with pytest.raises(
        DataError, match=r"a.parquet: no column 'text', only id, body; set the source's column"
    ):
        opened("parquet", tmp_path)
    with pytest.raises(DataError, match=r"a.parquet: column 'id' holds int64; set the source's column"):
        opened("parquet", tmp_path, column="id")
    file.write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=r"a.parquet: not a readable parquet file: .*; download it again"):
        opened("parquet", tmp_path)
    write_parquet(file, pa.array([], pa.string()))
    with pytest.raises(DataError, match=r"a.parquet: a parquet file without rows; remove it"):
        opened("parquet", tmp_path)


def test_parquet_null_is_named_with_its_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x", "y", "z", "w", None], 2)
    with pytest.raises(DataError, match=r"a.parquet row 4: 'text' is null, not text; remove the row"):
        texts(opened("parquet", tmp_path))


def test_parquet_text_that_is_no_utf8(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    write_parquet(tmp_path / "a.parquet", broken)
    with pytest.raises(DataError, match=r"a.parquet within 1024 rows from 0: 'text' is no UTF-8"):
        texts(opened("parquet", tmp_path))


def test_parquet_with_a_damaged_row_group(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [f"{i}" * 50 for i in range(4000)], 1000)
    start = pq.read_metadata(file).row_group(2).column(1).dictionary_page_offset
    raw = bytearray(file.read_bytes())
    raw[start : start + 500] = bytes(500)
    file.write_bytes(raw)
    source = opened("parquet", tmp_path)
    assert len(list(source.documents(1))) == 1000
    with pytest.raises(DataError, match=r"a.parquet row group 2: .*; download the file again, or remove it"):
        list(source.documents(2))


def test_parquet_checksums_are_verified(tmp_path):
    texts_written = [f"{i:050d}" for i in range(1000)]
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts_written}),
        file,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    file.write_bytes(file.read_bytes().replace(b"0" * 47 + b"123", b"0" * 47 + b"923"))
    with pytest.raises(DataError, match=r"a.parquet row group 0: .*CRC"):
        texts(opened("parquet", tmp_path))


def test_empty_and_binary_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"a.txt: empty file; remove it"):
        opened("text", tmp_path)
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"a.txt: holds NUL bytes, so it is no text; move it"):
        texts(opened("text", tmp_path))
