"""The first lines of a run: what trains, where to, on what."""

from __future__ import annotations

from pathlib import Path

import torch

from nanovl import __version__
from nanovl.config.schema import Job
from nanovl.log import Log
from nanovl.report.facts import parameter_counts
from nanovl.spec import ModelSpec


def say_header(log: Log, job: Job, spec: ModelSpec, place: str, folder: Path) -> None:
    """Say them; `place` = the mesh and the hardware."""
    training, threads = job.training, torch.get_num_threads()
    total, without_embeddings = parameter_counts(spec)
    batch = training.global_batch_size * training.seq_len
    log.say(
        f"nanovl {__version__}  train  {spec.family.name}  "
        f"{total:,} parameters ({without_embeddings:,} without embeddings)"
    )
    log.say(f"  run       {folder}")
    kinds = ", ".join(f"{s.kind} {s.path}".strip() for s in job.data.sources)
    log.say(f"  data      {kinds}: {batch * training.steps:,} tokens = {training.steps:,} steps of {batch:,}")
    log.say(f"  mesh      {place}, {threads} thread{'s' if threads > 1 else ''} a rank")
