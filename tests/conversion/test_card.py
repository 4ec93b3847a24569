"""The card keeps what is known of a model, through every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import nanovl
from nanovl.checkpoint.manager import read_meta
from nanovl.errors import CheckpointError

CARD = """---
license: apache-2.0
base_model: [some/model]
tags: [whatever]
date: 2026-01-02
---
# theirs
"""


def test_what_is_known_goes_there_and_back(experts_directory: Path, tmp_path: Path) -> None:
    source = shutil.copytree(experts_directory, tmp_path / "theirs")
    (source / "README.md").write_text(CARD)
    nanovl.convert(source, tmp_path / "dcp", to="safetensors")
    meta = read_meta(tmp_path / "dcp")
    assert meta["card"] == {"license": "apache-2.0", "base_model": ["some/model"]}
    trained = {"stage": "sft", "step": 650, "tokens": 12_000_000, "flops": 1.5e18}
    card = {**meta["card"], "data": "parquet web: all", "context": 2048, "bpb": "0.8123"}
    (tmp_path / "dcp" / "meta.json").write_text(json.dumps({**meta, **trained, "card": card}))
    path = tmp_path / "dcp"
    for name, to in (("hf", "hf"), ("run", "run"), ("again", "hf")):
        path = nanovl.convert(path, tmp_path / name, to=to)
    assert (tmp_path / "run" / "checkpoints" / "step_000650").is_dir()
    first, last = (ModelCard.load(tmp_path / name / "README.md") for name in ("hf", "again"))
    assert (last.data.license, last.data.base_model) == ("apache-2.0", ["some/model"])
    for row in (
        "| stage | sft |",
        "| steps | 650 |",
        "| tokens | 12,000,000 |",
        "| training FLOPs | 1.5e+18 |",
        "| bits per byte, held out | 0.8123 |",
        "| context in training | 2,048 |",
        "| data | parquet web: all |",
        "| base model | some/model |",
    ):
        assert row in first.text
        assert row in last.text
    assert "| made from | theirs; dcp; hf; step_000650 |" in last.text
    assert str(tmp_path) not in last.content
    assert "Licence: apache-2.0, by the card of the files" in last.text


def test_a_broken_card_is_named(experts_directory: Path, tmp_path: Path) -> None:
    source = shutil.copytree(experts_directory, tmp_path / "theirs")
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: its front matter cannot be read: .*; correct it"):
        nanovl.convert(source, tmp_path / "run", to="run")
