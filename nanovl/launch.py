"""The command line of `nanovl train`; torch is imported only once the flags are understood."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovl.config_tools import parse_job_flags


def main(argv: list[str]) -> int:
    """`nanovl train --config a.toml [--config b.toml] [--section.key=value] [--resume]`."""
    asked = parse_job_flags(
        argv, "train", {"--resume": "continue the run in job.run_dir at its newest checkpoint"}
    )
    with exit_code_kept():
        from nanovl.registry import read_job
        from nanovl.run import Run
        from nanovl.trainer import train

        job = read_job(asked.files, asked.flags, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        resume = "--resume" in asked.switches or Run(Path(job.job.run_dir)).is_of_this_launch()
        train(job, resume=resume, config_files=asked.files)
    return 0


@contextmanager
def exit_code_kept() -> Iterator[None]:
    """Leave the code of a SystemExit in the file that NANOVL_EXIT_CODE_FILE names, if any.

    torchrun does not pass on its workers' exit codes, and run_train.sh tells a stopped run from a failed one by it.
    """
    file = Path(os.environ.get("NANOVL_EXIT_CODE_FILE", os.devnull))
    if file != Path(os.devnull):
        file.unlink(missing_ok=True)  # of an attempt before this one
    try:
        yield
    except SystemExit as end:
        file.write_text(str(end.code))
        raise
