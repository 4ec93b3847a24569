"""A tokenizer whose ids are easy to foresee, and jobs over files of the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nanovl.config.schema import Data, Debug, Job, Source, Training

BOS = 256


class ByteTokenizer:
    """The 256 bytes, and 256 at the beginning of a document: a text of n bytes is n + 1 tokens."""

    vocab_size = 257
    bos_id = BOS

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [BOS] * bos + list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, threads: int = 1) -> list[list[int]]:
        return [self.encode(text, bos=bos) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BOS).decode(errors="replace")

    def hash(self) -> str:
        return "bytes"


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """Job over `sources`; other settings by their name in [data] or [training]."""

    def make(*sources: Source, **settings: object) -> Job:
        of_data = {key: settings.pop(key) for key in list(settings) if hasattr(Data(), key)}
        training = replace(Training(seq_len=32, local_batch_size=1, global_batch_size=4), **settings)  # type: ignore[arg-type]
        data = replace(Data(sources=list(sources), prefetch_batches=0), **of_data)  # type: ignore[arg-type]
        return Job(data=data, training=training, debug=Debug(seed=7))

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Source]:
    """Write texts as one jsonl file; the source that reads it."""

    def write(texts: Sequence[str], name: str = "a.jsonl", **settings: object) -> Source:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return Source(kind="jsonl", path=str(path), **settings)  # type: ignore[arg-type]

    return write


@pytest.fixture
def write_texts(tmp_path: Path) -> Callable[..., Source]:
    """Write texts as files of one folder; the source that reads it."""

    def write(texts: Sequence[str], folder: str = "texts", **settings: object) -> Source:
        (tmp_path / folder).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
        return Source(kind="text", path=str(tmp_path / folder), **settings)  # type: ignore[arg-type]

    return write
