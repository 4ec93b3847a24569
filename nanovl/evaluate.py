"""`nanovl evaluate`: bits per byte on held-out text of a run, a checkpoint, a Hugging Face directory, nanochat's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nanovl.errors import ConfigError, DataError
from nanovl.log import out, table


def main(argv: list[str]) -> int:
    """`nanovl evaluate PATH [--text FILE ...] [--max-bytes N]`."""
    args = _arguments(argv)

    import torch

    from nanovl.data.documents import heldout_texts
    from nanovl.data.loader import heldout_rows
    from nanovl.eval.bpb import bits_per_byte, compressor_bpb, run_alone
    from nanovl.inference.load import load

    loaded = load(args.path, device=args.device, dtype=args.dtype)
    if not args.text and (loaded.job is None or not loaded.job.data.sources):
        raise ConfigError(f"{args.path} names no held-out text of its own; give --text FILE")
    seq_len = args.seq_len or (loaded.job.training.seq_len if loaded.job else 2048)
    texts = _files(args.text) if args.text or loaded.job is None else heldout_texts(loaded.job)
    batches, text = heldout_rows(texts, loaded.tokenizer, seq_len, args.max_bytes, 0, 1, args.rows)
    token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes()).long()
    device = next(loaded.model.parameters()).device
    found = bits_per_byte(partial(run_alone, loaded.model), batches, token_bytes, device)
    baselines = compressor_bpb(text)
    if args.json:
        out(
            json.dumps(
                {
                    "path": str(loaded.path),
                    "bpb": found.bpb,
                    "bytes": found.bytes,
                    "tokens": found.tokens,
                    **baselines,
                }
            )
        )
    else:
        rows = [[str(loaded.path), found.bpb], *([name, bpb] for name, bpb in baselines.items())]
        out(table(["on the same text", "bits per byte"], rows))
        out(f"  {found.bytes:,} bytes, {found.tokens:,} tokens, rows of {seq_len}")
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanovl evaluate", description=__doc__)
    parser.add_argument("path", help="run folder, checkpoint, Hugging Face directory, or nanochat's folder")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        help="text file to measure on; default: the run's held-out text",
    )
    parser.add_argument(
        "--max-bytes", type=int, default=1_000_000, help="whole documents until this many bytes; 0 = all"
    )
    parser.add_argument("--seq-len", type=int, default=0, help="tokens a row; default: the job's, else 2048")
    parser.add_argument("--rows", type=int, default=8, help="rows at once")
    parser.add_argument("--device", default="", help="cpu, cuda, ...; default: a GPU if there is one")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    wrong = [
        f"--{k} = {v}: wants {w}"
        for k, v, ok, w in (
            ("max-bytes", args.max_bytes, args.max_bytes >= 0, "0 or more"),
            ("seq-len", args.seq_len, args.seq_len >= 0, "0 or more"),
            ("rows", args.rows, args.rows > 0, "1 or more"),
        )
        if not ok
    ]
    if wrong:
        raise ConfigError(wrong)
    return args


def _files(names: list[str]) -> Iterator[str]:
    for name in names:
        try:
            text = Path(name).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(f"--text {name}: {error}") from None
        if not text:
            raise DataError(f"--text {name}: empty; name a file with text")
        yield text
