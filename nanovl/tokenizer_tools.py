"""`nanovl tokenizer train|stats`: learn a tokenizer without a model, and see what one does to text."""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanovl.errors import ConfigError, DataError
from nanovl.log import out

if TYPE_CHECKING:
    from nanovl.tokenizer.bpe import AnyTokenizer

SAMPLE_CHARACTERS = 1_000_000
"""Characters of the training text that `train` measures the new tokenizer on."""


def main(argv: list[str]) -> int:
    """Run `nanovl tokenizer ARGV`. Raises NanovlError, and SystemExit(2) on a wrong command line."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.verb == "train":
        return _train(args.config, rest, Path(args.out))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _stats(Path(args.path), args.text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanovl tokenizer", description="Train a tokenizer, or measure one."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="train|stats")
    train = verbs.add_parser(
        "train",
        allow_abbrev=False,
        usage="nanovl tokenizer train --config FILE [--section.key=value ...] --out FOLDER",
        help="learn a tokenizer from the training documents of a job",
        description="Learn a tokenizer from the training documents of a job: [data] says which they are, "
        "[tokenizer] how large the vocabulary is, how much text it is learned from, and by which library.",
        epilog="Settings of the job can follow as --section.key=value, such as --tokenizer.vocab_size=8192.",
    )
    train.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="TOML job; several are merged in order",
    )
    train.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the tokenizer")
    stats = verbs.add_parser(
        "stats",
        allow_abbrev=False,
        help="size of a tokenizer, and how well it compresses text",
        description="Size of a tokenizer, and how well it compresses text.",
    )
    stats.add_argument("path", help="folder with a tokenizer.json, or a run")
    stats.add_argument(
        "--text", metavar="FILE", help="UTF-8 text; without it, the documentation inside Python"
    )
    return parser


class _Seen:
    """Documents on their way to a trainer: counted, the first ones kept."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.documents = 0
        self.characters = 0
        self.sample: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if self.characters < SAMPLE_CHARACTERS:
                self.sample.append(text)
            self.documents += 1
            self.characters += len(text)
            yield text


def _train(files: list[str], flags: list[str], folder: Path) -> int:
    from nanovl.config.load import load_job
    from nanovl.data.documents import training_texts
    from nanovl.tokenizer.train import cap_characters, train_tokenizer

    job = load_job(files, flags)
    settings = job.tokenizer
    if settings.path:
        raise ConfigError(
            f"tokenizer.path = {settings.path!r}: this job has a tokenizer already; add --tokenizer.path= to "
            "train another"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder}: exists and is not an empty folder; name a new one")
    caps = {"max_characters": settings.train_characters, "document_characters": settings.document_characters}
    seen = _Seen(cap_characters(training_texts(job), **caps))
    start = time.perf_counter()
    tokenizer = train_tokenizer(seen, settings.vocab_size, trainer=settings.trainer, **caps)
    seconds = time.perf_counter() - start
    tokenizer.save(folder)
    parts = f"256 bytes + {len(tokenizer.merges):,} merges + {len(tokenizer.special_ids)} special tokens"
    out(f"vocabulary  {tokenizer.vocab_size:,} = {parts}")
    out(f"text        {seen.characters:,} characters in {seen.documents:,} documents")
    out(f"time        {seconds:.1f} s to read and to learn, with {settings.trainer}")
    num_bytes, num_tokens = _count(tokenizer, seen.sample)
    out(f"compression {_ratio(num_bytes, num_tokens)} on the first {num_bytes:,} bytes of that text")
    out(f"saved       {folder}")
    return 0


def _stats(path: Path, text_file: str | None) -> int:
    from nanovl.tokenizer.bpe import load_tokenizer

    tokenizer = load_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    name, text = (text_file, _read_text(Path(text_file))) if text_file else _python_documentation()
    lengths = tokenizer.token_bytes()
    lengths = lengths[lengths > 0]
    num_bytes, num_tokens = _count(tokenizer, [text])
    bits = math.log2(tokenizer.vocab_size) * num_tokens / num_bytes
    gzip_bits = 8 * len(gzip.compress(text.encode(), 9)) / num_bytes
    out(f"vocabulary  {tokenizer.vocab_size:,}, of which {len(tokenizer.special_ids)} special tokens")
    out(f"token bytes {lengths.mean():.2f} on average, {lengths.min()} to {lengths.max()}")
    out(f"text        {name}: {num_bytes:,} bytes, {num_tokens:,} tokens")
    out(f"compression {_ratio(num_bytes, num_tokens)}")
    out(f"bits a byte {bits:.3f} with all tokens equally likely; gzip -9: {gzip_bits:.3f}")
    return 0


def _count(tokenizer: AnyTokenizer, texts: list[str]) -> tuple[int, int]:
    """Bytes and tokens of `texts`."""
    from nanovl.tokenizer.text import valid_unicode

    return sum(len(valid_unicode(t).encode()) for t in texts), sum(len(tokenizer.encode(t)) for t in texts)


def _ratio(num_bytes: int, num_tokens: int) -> str:
    return f"{num_bytes / max(num_tokens, 1):.3f} bytes a token"


def _read_text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--text {file}: {error.strerror}; name a readable file of text") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} is not UTF-8 ({error.reason}); convert it to UTF-8"
        ) from None
    if not text:
        raise DataError(f"{file}: is empty; name a file with text in it")
    return text


def _python_documentation() -> tuple[str, str]:
    """The language reference that Python's `help()` shows, and its name."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError(
            "--text: missing, and this Python comes without its documentation; name a file"
        ) from None
    return "Python's documentation (pydoc_data.topics)", "\n\n".join(topics[key] for key in sorted(topics))
