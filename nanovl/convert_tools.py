"""`nanovl convert`: a model from one format to another; docs/convert.md says what each is."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanovl.errors import ConfigError
from nanovl.log import out, progress


def main(argv: list[str]) -> int:
    """`nanovl convert SRC --to hf|run|dcp|safetensors|nanochat --out DIR`. Raises NanovlError."""
    parser = argparse.ArgumentParser(prog="nanovl convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("src", help="run folder, checkpoint, Hugging Face directory, or nanochat's folder")
    parser.add_argument(
        "--to",
        required=True,
        help="hf: a Hugging Face directory; run: a run folder; dcp: a checkpoint; safetensors: one of plain weights; "
        "nanochat: files of its first release",
    )
    parser.add_argument("--out", help="new folder to write it to")
    parser.add_argument(
        "--dtype", help="of written parameters: float32, bfloat16, float16; default: as they are stored"
    )
    parser.add_argument("--shard-size", help="most that one file of hf holds, such as 500MB; default: 5GB")
    parser.add_argument(
        "--without-mtp", action="store_true", help="leave modules of multi-token prediction away"
    )
    parser.add_argument(
        "--text-only",
        action="store_true",
        help="of a model with images or sound take the language model alone",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written, and write nothing"
    )
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        raise ConfigError("--out DIR: wanted, the new folder to write; or --dry-run")

    from nanovl.conversion.convert import plan, require_new

    if args.out is not None:
        require_new(Path(args.out))
    planned = plan(
        args.src,
        to=args.to,
        dtype=args.dtype,
        shard_size=args.shard_size,
        without_mtp=args.without_mtp,
        text_only=args.text_only,
    )
    if args.dry_run:
        out("\n".join(planned.mapping()))
        out(f"{planned.model.source.path}: {planned.summary()}; nothing written")
        return 0
    with progress(planned.nbytes) as count:
        planned.write(Path(args.out), count)
    out(f"{planned.model.source.path} -> {args.out}: {planned.summary()}")
    return 0
