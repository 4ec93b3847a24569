"""What a conversion leaves away when asked, how it takes its place on disk, and what it says meanwhile."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nanovl
from nanovl.checkpoint.hf import save_hf
from nanovl.checkpoint.tensors import named_weights
from nanovl.config.schema import Model
from nanovl.conversion.convert import new_folder, plan
from nanovl.convert_tools import main
from nanovl.errors import CheckpointError, RunError
from nanovl.log import progress
from nanovl.registry import resolve_model
from nanovl.run import Run
from nanovl.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="module")
def ahead_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-4.5 of two layers and a module of multi-token prediction."""
    overrides = {"num_hidden_layers": 2, "hidden_size": 32, "mtp": {"num_layers": 1}}
    spec = resolve_model(Model(name="glm4_moe", flavor="debug", overrides=overrides), 265)
    model = spec.family.model(spec.config)
    with torch.no_grad():
        for value in named_weights(model).values():
            value.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("ahead") / "theirs"
    save_hf(folder, named_weights(model), spec, torch.float32)
    Tokenizer([]).save(folder)
    return folder


@pytest.mark.parametrize("first", ["hf", "safetensors"])
def test_modules_are_left_away_when_asked(
    ahead_directory: Path, tmp_path: Path, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = nanovl.convert(ahead_directory, tmp_path / "first", to=first)
    assert main([str(source), "--to", "hf", "--dry-run", "--without-mtp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = "model.layers.2.eh_proj.weight" if first == "hf" else "mtp.2.eh_proj.weight"
    assert f"{named} -> left away" in lines
    count = sum(line.endswith("left away") for line in lines[:-1])
    assert f"; {count} tensors of multi-token prediction left away; nothing written" in lines[-1]
    if first == "hf":
        assert "list their tensors as UNEXPECTED" in (source / "README.md").read_text()
    less = nanovl.convert(source, tmp_path / "less", to="hf", without_mtp=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (ahead_directory, less))
    assert {name for name in before if not name.startswith("model.layers.2.")} == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert json.loads((less / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert f"| multi-token prediction | left away ({count} tensors) |" in (less / "README.md").read_text()
    _, said = transformers.AutoModelForCausalLM.from_pretrained(less, output_loading_info=True)
    assert not any(said.values()), said
    assert nanovl.load(less, device="cpu").spec.config.mtp is None
    with pytest.raises(CheckpointError, match="less: has no modules of multi-token prediction to leave away"):
        nanovl.convert(less, tmp_path / "again", to=first, without_mtp=True)


def test_a_module_that_cannot_be_read_can_be_left_away(ahead_directory: Path, tmp_path: Path) -> None:
    source = shutil.copytree(ahead_directory, tmp_path / "theirs")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.2.shared_head.head.weight"][0, 0] += 1
    save_file(stored, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shared_head\.head\.weight is not equal to lm_head"):
        plan(source, to="run")
    assert plan(source, to="run", without_mtp=True).model.spec.config.mtp is None


def test_sizes_of_shards_may_be_bytes(experts_directory: Path, tmp_path: Path) -> None:
    nanovl.convert(experts_directory, tmp_path / "hf", to="hf", shard_size=40_000)
    files = sorted((tmp_path / "hf").glob("model-*"))
    assert len(files) > 2
    assert all(sum(value.nbytes for value in load_file(file).values()) <= 40_000 for file in files)


def test_a_job_that_nobody_knows_is_not_made_up(experts_directory: Path, tmp_path: Path) -> None:
    nanovl.convert(experts_directory, tmp_path / "run", to="run")
    assert [*(tmp_path / "run").rglob("config.json")] == []
    assert nanovl.load(tmp_path / "run", device="cpu").job is None
    with pytest.raises(
        RunError, match=r"run holds weights alone, without a job; begin a run of its own with --chec"
    ):
        Run(tmp_path / "run").require_fresh(resume=True)


def test_two_conversions_to_one_folder_do_not_meet(experts_directory: Path, tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as draft:
        (draft / "mine").write_text("")
        with pytest.raises(RunError, match="out: another conversion is writing it; wait, or name another"):
            nanovl.convert(experts_directory, tmp_path / "out", to="dcp")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_folder_that_came_meanwhile_stays(tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "theirs"

    def write_it() -> None:
        with new_folder(tmp_path / "out") as draft:
            (draft / "mine").write_text("")
            theirs.mkdir(parents=True)

    with pytest.raises(OSError, match="not empty"):
        write_it()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_folder_in_use_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("")
    with pytest.raises(RunError, match="out is in use"), new_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_room_on_the_disk_is_looked_for_first(
    experts_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"out: wants 0\.\d GB, of which 0\.0 are free there; make room"
    ):
        nanovl.convert(experts_directory, tmp_path / "below" / "out", to="run")
    assert list(tmp_path.iterdir()) == []


def test_lines_tell_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[float] = iter([0.0, 30.0, 61.0, 100.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress(10 * 10**9) as count:
        for _ in range(4):
            count(10**9)
    assert capsys.readouterr().err.splitlines() == [
        "  2.0 of 10.0 GB, 33 MB/s",
        "  4.0 of 10.0 GB, 31 MB/s",
    ]


def test_all_bytes_are_counted(experts_directory: Path, tmp_path: Path) -> None:
    planned = plan(experts_directory, to="hf")
    told: list[int] = []
    planned.write(tmp_path / "hf", told.append)
    assert (
        sum(told)
        == planned.nbytes
        == sum(value.nbytes for value in load_file(tmp_path / "hf" / "model.safetensors").values())
    )


def test_a_mapping_has_one_table(
    experts_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nanovl.convert(experts_directory, tmp_path / "dcp", to="dcp")
    for to, line in (
        ("hf", r"embed_tokens.weight -> model.embed_tokens.weight  \(265, 32\) bfloat16"),
        ("run", r"embed_tokens.weight -> embed_tokens.weight  \(265, 32\) bfloat16"),
    ):
        assert main([str(tmp_path / "dcp"), "--to", to, "--dry-run"]) == 0
        lines: list[Any] = capsys.readouterr().out.splitlines()
        assert len([one for one in lines if "embed_tokens" in one]) == 1
        assert any(re.fullmatch(line, one) for one in lines)
    assert main([str(experts_directory), "--to", "hf", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines.count("writing:")) == ("reading:", 1)
