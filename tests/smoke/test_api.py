"""The public Python API, as docs/api.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nanovl
from nanovl.dist import fork_ranks
from nanovl.errors import CheckpointError
from nanovl.registry import read_job

ROOT = Path(__file__).parents[2]


def train(rank: int, folder: Path, flags: list[str]) -> str:
    job = read_job(
        [ROOT / "configs" / "debug.toml"], [*flags, "--training.steps=2", f"--job.run_dir={folder}"]
    )
    return str(nanovl.train(job).folder)


def test_train_load_generate(tmp_path: Path, tiny_flags: list[str]) -> None:
    import nanovl.trainer  # must not hide the function of the same room

    assert fork_ranks(train, 1, tmp_path / "run", tiny_flags) == [str(tmp_path / "run")]
    loaded = nanovl.load(tmp_path / "run", device="cpu", dtype="float32")
    tokens_BT = torch.tensor([loaded.tokenizer.encode("import os")])
    logits_BTV = loaded.model(tokens_BT)
    assert logits_BTV.dtype == torch.float32
    assert logits_BTV.shape == (1, tokens_BT.shape[1], loaded.tokenizer.vocab_size)
    assert loaded.tokenizer.decode(tokens_BT[0].tolist()) == "import os"
    assert loaded.job is not None
    assert loaded.job.training.steps == 2
    completion = nanovl.Engine(loaded).generate(["import"], max_tokens=3)[0]
    assert 1 <= len(completion.ids) <= 3
    import nanovl.conversion.convert  # nor this one
    import nanovl.convert_tools

    theirs = nanovl.convert(tmp_path / "run", tmp_path / "hf", to="hf", dtype="bfloat16")
    again = nanovl.load(theirs, device="cpu")
    assert again.job is None
    rounded = loaded.model.lm_head.weight.bfloat16().float()
    assert torch.equal(again.model.lm_head.weight, rounded)
    half = nanovl.load(tmp_path / "run" / "checkpoints" / "step_000002", device="cpu", dtype=torch.bfloat16)
    assert half.model(tokens_BT).dtype == torch.float32


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(CheckpointError, match=r"quikstart: no such folder; did you mean .*/quickstart\?"):
        nanovl.load(tmp_path / "quikstart")
    with pytest.raises(CheckpointError, match=r"nothing: no such folder$"):
        nanovl.load(tmp_path / "nothing")
    with pytest.raises(
        CheckpointError, match="neither a run folder, nor a checkpoint, nor a Hugging Face directory"
    ):
        nanovl.load(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        nanovl.lod  # noqa: B018
