"""The front matter of a Hugging Face directory's README.md: what is known of a model that no weight says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovl.errors import CheckpointError

CARD_FILE = "README.md"
PUBLISHED = ("license", "license_name", "license_link", "base_model", "datasets", "language")
"""What its publisher says, and goes wherever the weights go."""
OURS = "nanovl"
"""The key of what we know of the training."""
TRAINED = {"stage": str, "step": int, "tokens": int, "flops": float, "parents": list}
"""Keys of a checkpoint's meta.json among that."""


def read_facts(folder: Path) -> dict[str, Any]:
    """What `folder`/README.md says, as facts of a source: those of a meta.json, and the others below `card`.

    Raises CheckpointError where its front matter cannot be read.
    """
    file = folder / CARD_FILE
    if not file.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        # the values of YAML may be dates
        said: dict[str, Any] = json.loads(json.dumps(metadata_load(file) or {}, default=str))
        trained = said.get(OURS, {})
        facts = {key: kind(trained[key]) for key, kind in TRAINED.items() if key in trained}
        card = {key: value for key, value in trained.items() if key not in TRAINED}
    except Exception as error:  # the parser's own are of many kinds
        said_by_it = " ".join(str(error).split())
        raise CheckpointError(
            f"{file}: its front matter cannot be read: {said_by_it}; correct it, or take it away"
        ) from None
    card |= {key: said[key] for key in PUBLISHED if key in said}
    return {**facts, "card": card} if card else facts


def front_matter(trained: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """The front matter that `read_facts` reads."""
    from huggingface_hub.repocard_data import CardData

    ours = {OURS: dict(trained)} if trained else {}
    said = {"library_name": "transformers", "pipeline_tag": "text-generation", **published, **ours}
    return f"---\n{CardData(**said).to_yaml()}\n---\n"
