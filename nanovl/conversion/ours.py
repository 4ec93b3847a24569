"""Our own formats: a run folder, one checkpoint in DCP, and one whose weights are a plain model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovl import __version__
from nanovl.checkpoint.manager import save_weights
from nanovl.checkpoint.tensors import Held, Joined, Tensors, fresh_buffers
from nanovl.conversion.target import Model, Target
from nanovl.registry import spec_to_dict
from nanovl.run import Run

OF_A_SAVE = ("mesh", "world_size")
"""Facts of how a checkpoint was written, not of the model."""


class DcpTarget(Target):
    """A checkpoint of weights alone: any mesh loads it, training does not resume from it."""

    plain = False

    def tensors(self, model: Model) -> Tensors:
        known = model.weights.described
        fresh = {name: value for name, value in fresh_buffers(model.spec).items() if name not in known}
        return Joined(model.weights, Held(fresh))

    def write(self, model: Model, tensors: Tensors, folder: Path, final: Path) -> None:
        described = spec_to_dict(model.spec)
        meta = _meta(model, described)
        _write_job(model, described, folder, final)
        save_weights(folder, tensors, meta, plain=self.plain)


class PlainTarget(DcpTarget):
    """The same with the weights in one model.safetensors, under our names."""

    plain = True


class RunTarget(DcpTarget):
    """A run folder whose one checkpoint it is."""

    def write(self, model: Model, tensors: Tensors, folder: Path, final: Path) -> None:
        _write_job(model, spec_to_dict(model.spec), folder, final)
        step = model.source.facts.get("step", 0)
        super().write(model, tensors, Run(folder).checkpoints / f"step_{step:06d}", final)


def _write_job(model: Model, described: dict[str, Any], folder: Path, final: Path) -> None:
    """The tokenizer, and the job if one is known, where run folders and checkpoints both have them."""
    run, job = Run(folder), model.source.job
    if job is not None:
        job.job.run_dir = str(final)
        job.model.name, job.model.flavor, job.model.overrides = described["name"], "", described["config"]
        run.write_job(job, [])
    model.tokenizer.save(run.tokenizer)


def _meta(model: Model, described: dict[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in model.source.facts.items() if key not in OF_A_SAVE}
    return {
        "step": 0,
        "stage": "",
        **facts,
        "weights_only": True,
        "model": described,
        "tokenizer_hash": model.tokenizer.hash(),
        "parents": [*facts.get("parents", []), str(model.source.path)],
        "nanovl": __version__,
    }
