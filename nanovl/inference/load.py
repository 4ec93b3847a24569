"""`nanovl.load`: what a model is kept in -> model, tokenizer and job in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nanovl.checkpoint.locate import find_source
from nanovl.config.schema import Job
from nanovl.device import pick_device
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionCore
from nanovl.spec import Model, ModelSpec
from nanovl.tokenizer.bpe import AnyTokenizer, load_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model ready to use, and what belongs to it."""

    model: Model
    """Call it on tokens_BT (int64) for float32 logits [B, T, V]."""
    tokenizer: AnyTokenizer
    job: Job | None
    """The job that trained it; None where that is not known: a Hugging Face directory, nanochat's folder."""
    spec: ModelSpec
    path: Path
    """The checkpoint or directory the weights came from."""


def load(
    path: str | Path, *, device: str | torch.device = "", dtype: str | torch.dtype = torch.float32
) -> Loaded:
    """Load weights and tokenizer from a run folder (newest checkpoint), a checkpoint, a Hugging Face directory, or a
    folder of nanochat's own checkpoints (newest, or the file of weights that is named).

    `device` defaults to the GPU if there is one; `dtype` is that of the weights. Raises CheckpointError, ConfigError.
    """
    source = find_source(Path(path))
    spec = source.spec
    place = pick_device(name=str(device))
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    model.to_empty(device=place)
    model.init_buffers(place)
    source.fill(model)
    for parameter in model.parameters():  # buffers keep their precision: routers balance loads by thousandths
        parameter.data = parameter.data.to(_dtype(dtype))
    for module in model.modules():
        if isinstance(module, AttentionCore):  # calls are of any length, dtype and device
            module.scores = module.scores.uncompiled
    model.eval().requires_grad_(False)
    return Loaded(model, load_tokenizer(source.tokenizer), source.job, spec, source.path)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype = {dtype!r}: wants float32, bfloat16 or float16")
    found: torch.dtype = getattr(torch, dtype)
    return found
