"""The command line of `nanovl train`; torch is imported only once the flags are understood."""

from __future__ import annotations

import os

from nanovl.config_tools import parse_job_flags


def main(argv: list[str]) -> int:
    """`nanovl train --config a.toml [--config b.toml] [--section.key=value] [--resume]`."""
    asked = parse_job_flags(
        argv, "train", {"--resume": "continue the run in job.run_dir at its newest checkpoint"}
    )
    from nanovl.registry import read_job
    from nanovl.trainer import train

    job = read_job(asked.files, asked.flags, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    train(job, resume="--resume" in asked.switches, config_files=asked.files)
    return 0
