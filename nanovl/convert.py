"""`nanovl convert`: a run or checkpoint -> a Hugging Face directory, and back into a run folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nanovl.errors import RunError
from nanovl.log import out


def main(argv: list[str]) -> int:
    """`nanovl convert PATH --to hf|run --out DIR [--dtype D]`."""
    parser = argparse.ArgumentParser(prog="nanovl convert", description=__doc__)
    parser.add_argument("path", help="run folder, checkpoint or Hugging Face directory")
    parser.add_argument("--to", choices=("hf", "run"), required=True, help="what to write")
    parser.add_argument("--out", required=True, help="new folder to write it to")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of written weights",
    )
    args = parser.parse_args(argv)
    folder = Path(args.out)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"--out {folder} is in use; name a new folder")

    import torch

    from nanovl.inference.load import load

    loaded = load(args.path, device="cpu", dtype=args.dtype)
    if args.to == "hf":
        from nanovl.checkpoint.hf import named_weights, save_hf

        save_hf(folder, named_weights(loaded.model), loaded.spec, getattr(torch, args.dtype))
        loaded.tokenizer.save(folder)
        ids = {"bos_token_id": loaded.tokenizer.bos_id, "eos_token_id": loaded.tokenizer.bos_id}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    else:
        from nanovl.checkpoint.manager import save_weights
        from nanovl.config.schema import Job
        from nanovl.registry import spec_to_dict
        from nanovl.run import Run

        run = Run(folder)
        described = spec_to_dict(loaded.spec)
        job = loaded.job or Job()
        job.job.run_dir = str(folder)
        job.model.name, job.model.flavor, job.model.overrides = described["name"], "", described["config"]
        run.write_job(job, [])
        loaded.tokenizer.save(run.tokenizer)
        meta = {
            "stage": "converted",
            "model": described,
            "tokenizer_hash": loaded.tokenizer.hash(),
            "parents": [str(loaded.path)],
        }
        save_weights(run.checkpoints, loaded.model, meta, [run.config, run.tokenizer])
    out(f"{loaded.path} -> {folder}")
    return 0
