"""A tokenizer whose ids are easy to foresee, jobs over files of the test, and a server of shards."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


class ShardServer(ThreadingHTTPServer):
    """A real server of `body` at every path, with the manners that a test sets."""

    daemon_threads = True
    ranges = True
    cut_after: int | None = None
    """Bytes after which the first answer's connection ends."""
    errors: list[int]
    """Status of the next answers."""
    sha256 = ""
    """Answer with a redirect first, as Hugging Face does, that names this checksum."""
    body = b"PAR1" + bytes(range(256)) * 40 + b"PAR1"
    seen: list[tuple[str, str]]
    """(path, Range) of every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class ShardHandler(BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.seen.append((self.path, wanted))
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        if server.sha256 and not self.path.startswith("/cdn"):
            self.send_response(302)
            self.send_header("Location", f"{server.url}/cdn{self.path}")
            self.send_header("X-Linked-Etag", f'"{server.sha256}"')
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        total = len(server.body)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = total if server.cut_after is None else start + server.cut_after
        server.cut_after = None
        self.wfile.write(server.body[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ShardServer]:
    server = ShardServer(("127.0.0.1", 0), ShardHandler)
    server.errors, server.seen = [], []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
