"""`nanovl data show|get|pack`: packed rows as text, public shards, token shards made ahead."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from nanovl.config.schema import Job
from nanovl.config_tools import JobFlags, parse_job_flags
from nanovl.data.documents import Position, epoch_documents, training_texts
from nanovl.data.download import DATASETS, choose_shards, download_all
from nanovl.data.lanes import Encoder
from nanovl.data.loader import Loader
from nanovl.data.pack import Tokens
from nanovl.data.shards import SUFFIX, write_shard
from nanovl.data.sources import OpenSource, training_sources
from nanovl.errors import ConfigError, DataError, RunError
from nanovl.initial import tokenizer_folder
from nanovl.log import out
from nanovl.registry import read_job
from nanovl.run import Run
from nanovl.spec import Batch
from nanovl.tokenizer.bpe import AnyTokenizer, load_tokenizer
from nanovl.tokenizer.train import train_tokenizer

USAGE = """usage: nanovl data show RUN | --config FILE [--section.key=value ...] [--rows=N]
       nanovl data get DATASET [--shards=N] --out=DIR [--holdout=F] [--base-url=URL]
       nanovl data pack --config FILE [--section.key=value ...] --out=DIR [--shard-tokens=N]"""

SHARD_TOKENS = 100_000_000
PACK_BATCH_DOCUMENTS = 1024


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code."""
    verbs: dict[str, Callable[[list[str]], int]] = {"show": show, "get": get, "pack": pack}
    if not argv or argv[0] in ("-h", "--help"):
        out(USAGE)
        return 0
    if argv[0] not in verbs:
        near = difflib.get_close_matches(argv[0], verbs, 1)
        hint = f"did you mean {near[0]!r}?" if near else ", ".join(verbs)
        raise ConfigError(f"data {argv[0]}: no such verb; {hint}")
    return verbs[argv[0]](argv[1:])


def show(argv: list[str]) -> int:
    """Print the first rows that training would see, piece by piece, and how well they are packed."""
    run = Run(Path(argv[0])) if argv and not argv[0].startswith("-") else None
    asked = parse_job_flags(argv[1:] if run else argv, "data show", {"--rows=N": "rows to print (default 4)"})
    rows = _whole_number(asked.switches, "--rows", 4)
    job = read_job([*([_config_of(run)] if run else []), *asked.files], asked.flags)
    tokenizer = load_tokenizer(run.tokenizer) if run else _tokenizer(job)
    batch_rows = job.training.global_batch_size or job.training.local_batch_size
    job.training.local_batch_size, job.data.prefetch_batches = batch_rows, 0
    loader = Loader(job, tokenizer, rank=0, degree=1, global_rows=batch_rows)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, row in enumerate(_rows(loader, rows)):
        out(f"row {number % batch_rows} of step {number // batch_rows}")
        for line in row_lines(row, tokenizer, color):
            out(f"  {line}")
    stats = loader.stats()
    out(
        f"{stats['documents']:,.0f} documents read to fill {batch_rows * -(-rows // batch_rows)} rows; "
        f"{100 * stats['utilisation']:.1f}% of the positions have a loss, "
        f"{100 * stats['cropped']:.1f}% of the tokens read were cropped"
    )
    return 0


def row_lines(row: Mapping[str, object], tokenizer: Encoder, color: bool) -> Iterator[str]:
    """One line a piece of the row: document, positions, text, in grey or marked where it has no loss."""
    tokens, ids, weights = (np.asarray(row[key]) for key in ("tokens_BT", "doc_ids_BT", "weights_BT"))
    positions = np.asarray(row["positions_BT"])
    cuts = np.flatnonzero((np.diff(ids) != 0) | (np.diff(weights > 0) != 0)) + 1
    bounds = [0, *cuts.tolist(), len(tokens)]
    for start, end in pairwise(bounds):
        text = json.dumps(tokenizer.decode(tokens[start:end].tolist()), ensure_ascii=False)
        has_loss = weights[start] > 0
        text = text if has_loss else f"\033[90m{text}\033[0m" if color else f"(no loss) {text}"
        yield f"document {ids[start]}, positions {positions[start]}-{positions[end - 1]}: {text}"


def get(argv: list[str]) -> int:
    """Download shards of a public data set."""
    parser = argparse.ArgumentParser(
        prog="nanovl data get", description="download shards of a public data set"
    )
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--shards", type=int, default=8, help="files to fetch (default 8)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        help="also fetch the first file that data.sources.N.holdout of this size keeps for validation",
    )
    parser.add_argument("--base-url", default="", help="folder of the files on another server")
    asked = parser.parse_args(argv)
    dataset = DATASETS[asked.dataset]
    names = choose_shards(dataset, asked.shards, asked.holdout)
    download_all(asked.base_url or dataset.url, names, asked.out, out)
    out(f"{asked.out}: {len(names)} files of {asked.dataset}")
    return 0


def pack(argv: list[str]) -> int:
    """Tokenize the training text of every source into shards of kind "tokens", the tokenizer beside them."""
    extra = {
        "--out=DIR": "new folder for the shards and their tokenizer",
        "--shard-tokens=N": f"tokens a shard (default {SHARD_TOKENS:,})",
    }
    asked = parse_job_flags(argv, "data pack", extra)
    shard_tokens = _whole_number(asked.switches, "--shard-tokens", SHARD_TOKENS)
    folder = _new_folder(asked)
    job = read_job(asked.files, asked.flags)
    for i, settings in enumerate(job.data.sources):
        if settings.kind == "tokens":
            raise DataError(f'data.sources.{i}: kind "tokens" is packed already; leave this source out')
    draft = folder.with_name(folder.name + ".packing.tmp")  # renamed when whole: half a pack is never read
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer = _tokenizer(job)
    tokenizer.save(draft / "tokenizer")
    for i, source in enumerate(training_sources(job)):
        documents = tokens = shards = 0
        (draft / f"source_{i}").mkdir(parents=True)
        for shard in _shards(source, tokenizer, shard_tokens):
            name = f"shard_{shards:05d}{SUFFIX}"
            write_shard(draft / f"source_{i}" / name, shard, tokenizer.hash(), tokenizer.vocab_size)
            shards, documents, tokens = shards + 1, documents + len(shard), tokens + sum(map(len, shard))
            out(f"source_{i}/{name}: {tokens:,} tokens of {documents:,} documents so far")
    draft.rename(folder)
    out("packed; a job reads it with\n\n" + _job_lines(job, folder))
    return 0


def _rows(loader: Loader, number: int) -> Iterator[Batch]:
    """The first `number` rows of training, step after step."""
    while number > 0:
        (batch,) = loader.next_step()
        for i in range(min(number, len(batch["tokens_BT"]))):
            yield {key: value[i] for key, value in batch.items()}
        number -= len(batch["tokens_BT"])


def _shards(source: OpenSource, tokenizer: Encoder, shard_tokens: int) -> Iterator[list[Tokens]]:
    """The source's documents in the order of its files, as lists of about `shard_tokens` tokens."""
    stream = (str(text) for text, _ in epoch_documents(source, Position(), seed=0, shuffle=False))
    shard: list[Tokens] = []
    size = 0
    while texts := list(islice(stream, PACK_BATCH_DOCUMENTS)):
        for ids in tokenizer.encode_batch(texts, threads=os.cpu_count() or 1):
            shard.append(np.array(ids, dtype=np.int32))
            size += len(ids)
            if size >= shard_tokens:
                yield shard
                shard, size = [], 0
    if shard:
        yield shard


def _tokenizer(job: Job) -> AnyTokenizer:
    """The one that the job begins with, else one learned from its text, as training would."""
    if (folder := tokenizer_folder(job)) is not None:
        return load_tokenizer(folder)
    settings = job.tokenizer
    out(f"training a tokenizer of {settings.vocab_size:,} entries; name one in tokenizer.path to spare that")
    return train_tokenizer(
        training_texts(job),
        settings.vocab_size,
        trainer=settings.trainer,
        max_characters=settings.train_characters,
        document_characters=settings.document_characters,
    )


def _job_lines(job: Job, folder: Path) -> str:
    """TOML that reads the packed shards, and validates on the same text as before."""
    lines = ["[tokenizer]", f"path = {json.dumps(str(folder / 'tokenizer'))}"]
    for i, source in enumerate(job.data.sources):
        path = json.dumps(str(folder / f"source_{i}"))
        lines += ["", "[[data.sources]]", 'kind = "tokens"', f"path = {path}", f"weight = {source.weight}"]
    for source in job.validation.sources or [s for s in job.data.sources if s.holdout]:
        lines += ["", "[[validation.sources]]", f"kind = {json.dumps(source.kind)}"]
        lines += [f"path = {json.dumps(source.path)}"] if source.path else []
        lines += [f"column = {json.dumps(source.column)}", f"holdout = {source.holdout}"]
    return "\n".join(lines)


def _config_of(run: Run) -> str:
    if not run.is_used():
        raise RunError(f"{run.folder} is no run folder: it has no config.json; give a run, or --config FILE")
    return str(run.config)


def _new_folder(asked: JobFlags) -> Path:
    if not asked.switches.get("--out"):
        raise ConfigError("data pack: needs --out=DIR, a new folder for the shards")
    folder = Path(asked.switches["--out"])
    if folder.exists():
        raise ConfigError(f"--out = {folder}: exists already; remove it, or choose another")
    return folder


def _whole_number(switches: Mapping[str, str], name: str, default: int) -> int:
    text = switches.get(name, str(default))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{name} = {text!r}: wants a whole number above 0")
    return int(text)
