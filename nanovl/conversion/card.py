"""README.md of a Hugging Face directory: what is known of the model, and what is not said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovl import __version__
from nanovl.checkpoint.hf import main_dtype
from nanovl.checkpoint.tensors import weights_of
from nanovl.conversion.target import Model

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
---
"""
USE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```
"""


def model_card(model: Model, folder: str) -> str:
    """Markdown, for a folder of that name."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in _facts(model))
    base = model.source.facts.get("stage") == "pretrain"
    turns = "It was trained on documents, not on conversations: it continues text.\n\n" if base else ""
    return (
        f"{HEAD}\n# {folder}\n\nWritten by nanovl {__version__}.\n\n{turns}| | |\n|---|---|\n{rows}"
        f"{USE.format(folder=folder)}\n"
        "Licence: not stated. Whoever publishes this names one, having regard to the data above.\n"
    )


def _facts(model: Model) -> list[tuple[str, str]]:
    spec, known, job = model.spec, model.source.facts, model.source.job
    parameters = sum(v.numel() for v in weights_of(spec).values() if v.requires_grad)
    rows = [
        ("architecture", spec.family.name + (f", {spec.flavor}" if spec.flavor else "")),
        ("parameters", f"{parameters:,}"),
        ("layers x width", f"{spec.config.num_hidden_layers} x {spec.config.hidden_size}"),
        ("vocabulary", f"{spec.config.vocab_size:,}"),
        ("multi-token prediction", _ahead(model)),
        ("dtype", str(main_dtype(model.weights)).removeprefix("torch.")),
        ("stage", str(known.get("stage", ""))),
        ("steps", f"{known['step']:,}" if known.get("step") else ""),
        ("tokens", f"{known['tokens']:,}" if known.get("tokens") else ""),
        ("training FLOPs", f"{known['flops']:.3g}" if known.get("flops") else ""),
        ("bits per byte, held out", _bpb(model.source.path, known)),
        ("context in training", f"{job.training.seq_len:,}" if job and known.get("tokens") else ""),
        ("data", "; ".join(f"{s.kind} {Path(s.path).name}".strip() for s in job.data.sources) if job else ""),
        ("made from", "; ".join(Path(p).name for p in [*known.get("parents", []), model.source.path])),
    ]
    return [(name, value) for name, value in rows if value]


def _ahead(model: Model) -> str:
    if model.left_away:
        return f"left away ({len(model.left_away)} tensors)"
    mtp = getattr(model.spec.config, "mtp", None)
    return "" if mtp is None else f"{mtp.num_layers}, which transformers does not load"


def _bpb(checkpoint: Path, known: dict[str, Any]) -> str:
    """As measured when the run ended at this checkpoint."""
    file = checkpoint.parent.parent / "evals" / f"step_{known.get('step', 0):06d}.json"
    if not file.exists():
        return ""
    value = json.loads(file.read_text(encoding="utf-8")).get("val/bpb")
    return "" if value is None else f"{value:.4f}"
