"""README.md of a Hugging Face directory: what is known of the model, and what is not said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovl import __version__
from nanovl.checkpoint.front_matter import PUBLISHED, TRAINED, front_matter
from nanovl.checkpoint.hf import main_dtype
from nanovl.checkpoint.tensors import weights_of
from nanovl.conversion.target import MTP, Model

USE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```
"""


def model_card(model: Model, folder: str, *, bos_first: bool) -> str:
    """Markdown, for a folder of that name, whose tokenizer puts bos first by itself or does not."""
    card = _card(model)
    published = {key: card[key] for key in PUBLISHED if key in card}
    trained = {key: value for key, value in _trained(model).items() if value}
    trained |= {key: value for key, value in card.items() if key not in PUBLISHED and value}
    rows = "".join(f"| {name} | {value} |\n" for name, value in _facts(model, card) if value)
    said = "".join(f"{line}\n\n" for line in _remarks(model, bos_first=bos_first))
    return (
        f"{front_matter(trained, published)}\n# {folder}\n\nWritten by nanovl {__version__}.\n\n"
        f"| | |\n|---|---|\n{rows}{USE.format(folder=folder)}\n{said}{_licence(published)}\n"
    )


def _trained(model: Model) -> dict[str, Any]:
    """What a meta.json knows; parents by their names alone."""
    known = model.source.facts
    parents = [Path(p).name for p in [*known.get("parents", []), model.source.path]]
    return {**{key: known[key] for key in TRAINED if key in known}, "parents": parents}


def _card(model: Model) -> dict[str, Any]:
    """What the job and the evaluation of a run add, and what an earlier card said."""
    known, job = model.source.facts, model.source.job
    found: dict[str, Any] = {"bpb": _bpb(model.source.path, known)}
    if job is not None:
        found["context"] = job.training.seq_len if known.get("tokens") else None
        found["data"] = "; ".join(f"{s.kind} {Path(s.path).name}".strip() for s in job.data.sources)
    return {**known.get("card", {}), **{key: value for key, value in found.items() if value}}


def _facts(model: Model, card: dict[str, Any]) -> list[tuple[str, str]]:
    spec, trained = model.spec, _trained(model)
    parameters = sum(v.numel() for v in weights_of(spec).values() if v.requires_grad)
    base = card.get("base_model", "")
    return [
        ("architecture", spec.family.name + (f", {spec.flavor}" if spec.flavor else "")),
        ("parameters", f"{parameters:,}"),
        ("layers x width", f"{spec.config.num_hidden_layers} x {spec.config.hidden_size}"),
        ("vocabulary", f"{spec.config.vocab_size:,}"),
        (MTP, _ahead(model)),
        ("dtype", str(main_dtype(model.weights)).removeprefix("torch.")),
        ("stage", trained.get("stage", "")),
        ("steps", f"{trained['step']:,}" if trained.get("step") else ""),
        ("tokens", f"{trained['tokens']:,}" if trained.get("tokens") else ""),
        ("training FLOPs", f"{trained['flops']:.3g}" if trained.get("flops") else ""),
        ("bits per byte, held out", card.get("bpb", "")),
        ("context in training", f"{card['context']:,}" if card.get("context") else ""),
        ("data", card.get("data", "")),
        ("base model", "; ".join([base] if isinstance(base, str) else base)),
        ("made from", "; ".join(trained["parents"])),
    ]


def _ahead(model: Model) -> str:
    if MTP in model.left_away:
        return f"left away ({len(model.left_away[MTP])} tensors)"
    mtp = getattr(model.spec.config, "mtp", None)
    return "" if mtp is None else str(mtp.num_layers)


def _remarks(model: Model, *, bos_first: bool) -> list[str]:
    found = []
    if model.source.facts.get("stage") == "pretrain":
        found.append("It was trained on documents, not on conversations: it continues text.")
    if model.tokenizer.bos_id is not None:
        bos = model.tokenizer.decode([model.tokenizer.bos_id])
        found.append(
            f"nanovl begins a text with `{bos}`, and so does this tokenizer; a chat has it from the template."
            if bos_first
            else f"nanovl begins a text with `{bos}`; tokenizer.json does not put it there by itself."
        )
    if getattr(model.spec.config, "mtp", None) is not None:
        found.append(
            "The files also hold the modules of multi-token prediction. `AutoModelForCausalLM` does not load them, and "
            "may list their tensors as UNEXPECTED; the model is whole without them."
        )
    return found


def _licence(published: dict[str, Any]) -> str:
    if "license" in published:
        return f"Licence: {published['license']}, by the card of the files that these weights come from."
    return "Licence: not stated. Whoever publishes this names one, having regard to the data above."


def _bpb(checkpoint: Path, known: dict[str, Any]) -> str:
    """As measured when the run ended at this checkpoint."""
    file = checkpoint.parent.parent / "evals" / f"step_{known.get('step', 0):06d}.json"
    if not file.exists():
        return ""
    value = json.loads(file.read_text(encoding="utf-8")).get("val/bpb")
    return "" if value is None else f"{value:.4f}"
