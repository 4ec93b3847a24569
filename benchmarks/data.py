"""How fast text becomes batches: reading, tokenizing, packing, and the whole loader, on one thread.

    python benchmarks/data.py [--vocab 4096] [--seconds 3] [--out benchmarks]

Two corpora: Python's own library as it is (long files), and the same text cut into documents of web-page
lengths (lognormal, median 2,000 characters), one a line of a jsonl file. Each figure is the best of three.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from nanovl.config.schema import Data, Job, Source, Training
from nanovl.data.documents import Position, epoch_documents, training_texts
from nanovl.data.loader import Loader
from nanovl.data.pack import Tokens, best_fit_row, concat_row, row_arrays
from nanovl.data.sources import open_source
from nanovl.device import hardware
from nanovl.log import table
from nanovl.tokenizer.bpe import Tokenizer
from nanovl.tokenizer.train import train_tokenizer

ROWS = 8
ROUNDS = 3


def job_over(source: Source, packing: str = "concat", seq_len: int = 512) -> Job:
    training = Training(seq_len=seq_len, local_batch_size=ROWS, global_batch_size=ROWS)
    return Job(data=Data(sources=[source], packing=packing, prefetch_batches=0), training=training)  # type: ignore[arg-type]


def web_like(folder: Path) -> Source:
    """The library's text in documents of web-page lengths."""
    generator = random.Random(0)
    text = "".join(training_texts(job_over(Source(kind="stdlib"))))
    with (folder / "web_like.jsonl").open("w", encoding="utf-8") as file:
        at = 0
        while at < len(text):
            length = max(50, round(generator.lognormvariate(math.log(2000), 1.0)))
            file.write(json.dumps({"text": text[at : at + length]}) + "\n")
            at += length
    return Source(kind="jsonl", path=str(folder))


def best_rate(work: Callable[[], float], seconds: float) -> float:
    """Units a second of `work`, which returns how many it did; the best of ROUNDS."""
    rates = []
    for _ in range(ROUNDS):
        began, done = time.perf_counter(), 0.0
        while (taken := time.perf_counter() - began) < seconds / ROUNDS:
            done += work()
        rates.append(done / taken)
    return max(rates)


def read_rate(source: Source, seconds: float) -> float:
    """MB of UTF-8 text a second, from files that the system has in memory."""
    opened = open_source(source, "data.sources.0", "all")

    def stream() -> Iterator[str]:
        for epoch in itertools.count():
            yield from (str(d) for d, _ in epoch_documents(opened, Position(epoch), seed=0, shuffle=True))

    texts = stream()
    return best_rate(lambda: sum(len(next(texts).encode()) for _ in range(50)) / 1e6, seconds)


def tokenize_rate(texts: list[str], tokenizer: Tokenizer, seconds: float) -> tuple[float, float]:
    """MB of text and tokens a second, and with it bytes a token."""
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, tokenizer.encode_batch(texts, bos=True)))
    rate = best_rate(lambda: (tokenizer.encode_batch(texts, bos=True), size / 1e6)[1], seconds)
    return rate, rate * 1e6 * tokens / size


def pack_rate(documents: list[Tokens], packing: str, seq_len: int, seconds: float) -> float:
    """Tokens a second that come out of the packer as arrays, from documents that are tokenized already."""
    waiting: list[Tokens] = []
    pull = itertools.cycle(documents).__next__

    def one_row() -> float:
        if packing == "concat":
            row = concat_row(waiting, pull, seq_len + 1)
        else:
            row = best_fit_row(waiting, pull, seq_len + 1, 64, "crop")
        row_arrays(row.pieces, seq_len, 0)
        return seq_len

    return best_rate(one_row, seconds)


def loader_rate(job: Job, tokenizer: Tokenizer, seconds: float) -> dict[str, float]:
    """The whole loader without prefetching: tokens a second, MB of text read for them, share cropped."""
    loader = Loader(job, tokenizer, rank=0, degree=1)
    loader.next_step()  # the first step also fills the buffers
    loader.stats()
    steps = []

    def step() -> float:
        loader.next_step()
        steps.append(loader.stats())
        return ROWS * job.training.seq_len

    rate = best_rate(step, seconds)
    tokens = sum(s["tokens"] for s in steps)
    read = sum(s["tokens"] / (1 - s["cropped"]) for s in steps)
    return {
        "tokens_per_second": rate,
        "cropped": 1 - tokens / read,
        "read_tokens_per_second": rate * read / tokens,
    }


def measure(vocab: int, seconds: float) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpora = {"library": Source(kind="stdlib"), "web-like": web_like(Path(folder))}
        tokenizer = train_tokenizer(
            training_texts(job_over(corpora["library"])),
            vocab,
            trainer="rustbpe",
            max_characters=10_000_000,
            document_characters=10_000,
        )
        for name, source in corpora.items():
            texts = list(itertools.islice(training_texts(job_over(source)), 300))
            documents = [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_batch(texts, bos=True)]
            text_rate, token_rate = tokenize_rate(texts, tokenizer, seconds)
            bytes_per_token = text_rate * 1e6 / token_rate
            found[f"{name}: read"] = {"mb_per_second": read_rate(source, seconds)}
            found[f"{name}: tokenize"] = {"mb_per_second": text_rate, "tokens_per_second": token_rate}
            for packing, seq_len in itertools.product(("best_fit", "concat"), (512, 2048)):
                packed = pack_rate(documents, packing, seq_len, seconds)
                found[f"{name}: pack {packing} {seq_len}"] = {"tokens_per_second": packed}
                loaded = loader_rate(job_over(source, packing, seq_len), tokenizer, seconds)
                loaded["mb_per_second"] = loaded.pop("read_tokens_per_second") * bytes_per_token / 1e6
                found[f"{name}: loader {packing} {seq_len}"] = loaded
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--out", default="", help="folder for the .md and .json")
    args = parser.parse_args()
    found = measure(args.vocab, args.seconds)
    header = ["what", "MB/s of text", "tokens/s", "cropped"]
    rows = [
        [
            name,
            *(
                f"{r[k]:{spec}}" if k in r else ""
                for k, spec in (("mb_per_second", ",.1f"), ("tokens_per_second", ",.0f"), ("cropped", ".1%"))
            ),
        ]
        for name, r in found.items()
    ]
    print(table(header, rows))
    if args.out:
        write(Path(args.out), args, hardware(torch.device("cpu")), header, rows, found)


def write(
    folder: Path,
    args: argparse.Namespace,
    machine: str,
    header: list[str],
    rows: list[list[str]],
    found: dict[str, dict[str, Any]],
) -> None:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    slug = "".join(c if c.isalnum() else "-" for c in machine.lower()).strip("-")
    stem = folder / f"data_{slug}_{time.strftime('%Y-%m-%d')}"
    facts = {"hardware": machine, "python": platform.python_version(), "commit": commit}
    settings = {"vocab": args.vocab, "seconds": args.seconds, "rows": ROWS}
    stem.with_suffix(".json").write_text(json.dumps({**facts, **settings, "results": found}, indent=2) + "\n")
    lines = [
        "# From text to batches, on one thread",
        "",
        f"`python benchmarks/data.py --vocab {args.vocab} --seconds {args.seconds:g}` at commit {commit}.",
        f"{machine}, Python {facts['python']}; {ROWS} rows a step, no prefetching, best of {ROUNDS} rounds.",
        "Loader: tokens/s that reach the trainer, MB/s of text read for them, share of it cropped.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
