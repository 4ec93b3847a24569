"""How each kind of file is read: in how many parts it can be entered, and the documents of one part.

Parts are what makes reading random access: a parquet row group, 1 MiB of lines, a block of packed documents.
What cannot be entered in the middle (a text file, gzip) is one part.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovl.data.shards import SUFFIX, num_blocks, read_block
from nanovl.errors import DataError
from nanovl.tokenizer.text import valid_unicode

Document = str | NDArray[np.int32]
"""Text, or the token ids of text that was packed ahead; neither has the token that begins a document."""

JSONL_BLOCK_BYTES = 1 << 20
STDLIB_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class DataFile:
    path: Path
    name: str
    """Path below the source's folder, with `/`."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Kind:
    """One kind of source. Both functions raise DataError naming the file, and what of it cannot be read."""

    suffixes: tuple[str, ...]
    """Names that belong to the kind in a folder."""
    parts: Callable[[DataFile, str], int]
    """(file, column) -> number of parts; also checks what can be checked without reading it all."""
    documents: Callable[[DataFile, int, str], Iterable[Document]]
    """(file, part, column) -> its documents, in the order of the file."""


def _one_part(file: DataFile, column: str) -> int:
    if file.size == 0:
        raise DataError(f"{file.path}: empty file; remove it, or move it out of the source's folder")
    return 1


def _read_text(file: DataFile, part: int, column: str) -> Iterator[str]:
    raw = file.path.read_bytes()
    if b"\0" in raw:
        raise DataError(f"{file.path}: holds NUL bytes, so it is no text; move it out of the source's folder")
    yield raw.decode("utf-8", errors="replace").removeprefix("\ufeff")


def _read_stdlib(file: DataFile, part: int, column: str) -> Iterator[str]:
    if file.name != STDLIB_TOPICS:
        yield file.path.read_bytes().decode("utf-8", errors="replace")
        return
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _jsonl_parts(file: DataFile, column: str) -> int:
    _one_part(file, column)
    return 1 if file.path.suffix == ".gz" else -(-file.size // JSONL_BLOCK_BYTES)


def _read_jsonl(file: DataFile, part: int, column: str) -> Iterator[str]:
    is_gzip = file.path.suffix == ".gz"
    for place, line in _gzip_lines(file) if is_gzip else _block_lines(file, part):
        try:
            text = _json_text(line, column)
        except ValueError as error:
            number = place if is_gzip else _line_number(file.path, place)
            raise DataError(f"{file.path} line {number}: {error}") from None
        if text is not None:
            yield text


def _gzip_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of every line."""
    try:
        with gzip.open(file.path) as lines:
            yield from enumerate(lines, 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.path}: broken gzip: {error}; download it again, or remove it") from None


def _block_lines(file: DataFile, part: int) -> list[tuple[int, bytes]]:
    """(offset in bytes, line) of the lines that begin in the file's `part`th MiB."""
    lines = []
    with file.path.open("rb") as stream:
        at = part * JSONL_BLOCK_BYTES
        if at:
            stream.seek(at - 1)
            # the rest of a line that begins in an earlier part; it may go on beyond this one
            at += len(stream.readline(JSONL_BLOCK_BYTES + 1)) - 1
        while at < (part + 1) * JSONL_BLOCK_BYTES and (line := stream.readline()):
            lines.append((at, line))
            at += len(line)
    return lines


def _json_text(line: bytes, column: str) -> str | None:
    """The text of one line; None for a blank one. Raises ValueError with what is wrong and what to do."""
    text = line.decode("utf-8", errors="replace").removeprefix("\ufeff").strip()
    if not text:
        return None
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; mend or remove the line") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {_json_type(value)} where an object is wanted; mend or remove the line")
    if column not in value:
        keys = ", ".join(value) or "none"
        raise ValueError(f"no key {column!r}, only {keys}; set the source's column to one that holds text")
    if not isinstance(value[column], str):
        raise ValueError(f"{column!r} is a {_json_type(value[column])}, not text; mend or remove the line")
    return valid_unicode(value[column])


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _line_number(path: Path, offset: int) -> int:
    """Number of the line that begins at byte `offset`, from 1."""
    number = 1
    with path.open("rb") as stream:
        while offset > 0 and (chunk := stream.read(min(offset, 1 << 20))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


def _parquet_parts(file: DataFile, column: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path}: not a readable parquet file: {_line(error)}; download it again, or remove it"
        ) from None
    if metadata.num_rows == 0:
        raise DataError(f"{file.path}: a parquet file without rows; remove it")
    if column not in schema.names:
        raise DataError(
            f"{file.path}: no column {column!r}, only {', '.join(schema.names)}; "
            "set the source's column to one that holds text"
        )
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(
            f"{file.path}: column {column!r} holds {kind}; set the source's column to one that holds text"
        )
    groups: int = metadata.num_row_groups
    return groups


def _read_parquet(file: DataFile, part: int, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            metadata = parquet.metadata
            before = sum(metadata.row_group(i).num_rows for i in range(part))
            values = parquet.read_row_group(part, columns=[column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path} row group {part}: {_line(error)}; download the file again, or remove it"
        ) from None
    for start in range(0, len(values), 1024):
        try:
            texts = values.slice(start, 1024).to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path} within 1024 rows from {before + start}: {column!r} is no UTF-8: {error}; "
                "write the file again from valid text"
            ) from None
        for row, text in enumerate(texts, before + start):
            if text is None:
                raise DataError(f"{file.path} row {row}: {column!r} is null, not text; remove the row")
            yield text


def _line(error: Exception) -> str:
    return " ".join(str(error).split())  # arrow's errors have several lines


def _token_parts(file: DataFile, column: str) -> int:
    return num_blocks(file.path)


def _read_tokens(file: DataFile, part: int, column: str) -> list[NDArray[np.int32]]:
    return read_block(file.path, part)


KINDS = {
    "stdlib": Kind((".py",), lambda file, column: 1, _read_stdlib),
    "text": Kind(("",), _one_part, _read_text),
    "jsonl": Kind((".jsonl", ".jsonl.gz"), _jsonl_parts, _read_jsonl),
    "parquet": Kind((".parquet",), _parquet_parts, _read_parquet),
    "tokens": Kind((SUFFIX,), _token_parts, _read_tokens),
}
"""By `data.sources.N.kind`."""
