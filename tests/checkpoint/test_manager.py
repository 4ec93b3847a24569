"""Checkpoints: exact return, other meshes, commit and clean-up, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nanovl.checkpoint.manager import Checkpointer, committed, load_weights, read_meta
from nanovl.checkpoint.sources import Checkpoint
from nanovl.config.schema import Job, Model
from nanovl.device import Modes
from nanovl.dist import fork_ranks, world_from_env
from nanovl.errors import CheckpointError
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.parallelisms.apply import parallelize
from nanovl.parallelisms.init import init_weights, materialize
from nanovl.registry import ModelSpec, resolve_model

CPU = torch.device("cpu")


def spec(**overrides: Any) -> ModelSpec:
    return resolve_model(
        Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": 2, **overrides}), 512
    )


def build(copies: int = 1, **overrides: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    job = Job()
    job.parallelism.data_parallel_replicate_degree = copies
    which = spec(**overrides)
    with torch.device("meta"):
        model = which.family.model(which.config)
    world = world_from_env()
    parallelize(model, job, build_mesh(job.parallelism, world.size, CPU), Modes(torch.float32, False), Log(1))
    materialize(model, CPU)
    init_weights(model, seed=1)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """The same rows on every rank; gradients are summed over ranks, so each carries its share of the loss."""
    losses = []
    share = 1 / (32 * world_from_env().size)
    for step in range(first, last):
        tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(step))
        x, y = tokens[:, :-1], tokens[:, 1:]
        loss = model(
            x, objective=lambda head, h, y=y: head.cross_entropy(h, y, torch.full(y.shape, share), 16)[0]
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() * world_from_env().size)
    return losses


def save_and_go_on(rank: int, folder: Path, background: bool, copies: int) -> list[float]:
    model, optimizer = build(copies)
    take_steps(model, optimizer, 0, 2)
    checkpointer = Checkpointer(folder, model, [optimizer], 0, background, Log(1))
    checkpointer.save(2, {"note": "x"}, {"lane": rank}, [])
    losses = take_steps(model, optimizer, 2, 5)  # goes on while a background save is under way
    checkpointer.wait()
    return losses


def resume(rank: int, folder: Path, copies: int) -> tuple[list[float], list[dict[str, Any]]]:
    model, optimizer = build(copies)
    restored = Checkpointer(folder, model, [optimizer], 0, False, Log(1)).load(folder / "step_000002")
    return take_steps(model, optimizer, 2, 5), restored.ranks


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_same_mesh_returns_bit_equal(tmp_path: Path, world: int, background: bool) -> None:
    expected = fork_ranks(save_and_go_on, world, tmp_path, background, 1)
    actual = fork_ranks(resume, world, tmp_path, 1)
    assert [losses for losses, _ in actual] == expected
    assert actual[0][1] == [{"lane": rank} for rank in range(world)]


@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), (1, 1)), ((1, 1), (4, 2)), ((4, 2), (2, 1))])
def test_other_meshes_go_on_alike(tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]) -> None:
    expected = fork_ranks(save_and_go_on, saved[0], tmp_path, False, saved[1])[0]
    actual = fork_ranks(resume, loaded[0], tmp_path, loaded[1])[0][0]
    assert actual == pytest.approx(expected, rel=1e-5)


def keep_two(rank: int, folder: Path) -> list[str]:
    model, optimizer = build()
    (folder / "step_000009.tmp" / "state").mkdir(parents=True)
    checkpointer = Checkpointer(folder, model, [optimizer], 2, False, Log(1))
    for step in (1, 2, 3):
        checkpointer.save(step, {}, {}, [])
    checkpointer.save(3, {}, {}, [])  # again: a checkpoint is never written over
    return sorted(p.name for p in folder.iterdir())


def test_keeps_the_newest_and_removes_what_a_kill_left(tmp_path: Path) -> None:
    assert fork_ranks(keep_two, 1, tmp_path)[0] == ["step_000002", "step_000003"]


def copies_files(rank: int, folder: Path, files: list[Path]) -> None:
    model, optimizer = build()
    Checkpointer(folder, model, [optimizer], 0, False, Log(1)).save(7, {"stage": "pretrain"}, {}, files)


def resumes_from_converted(rank: int, folder: Path) -> str:
    model, optimizer = build()
    checkpointer = Checkpointer(folder, model, [optimizer], 0, False, Log(1))
    checkpointer.save(1, {"weights_only": True}, {}, [])
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load(folder / "step_000001")
    return str(caught.value)


def test_a_converted_checkpoint_has_nothing_to_resume_from(tmp_path: Path) -> None:
    said = fork_ranks(resumes_from_converted, 1, tmp_path)[0]
    assert "was converted, so it holds no optimizer" in said
    assert said.endswith("start a new run with checkpoint.initial_load_path")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "a.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    fork_ranks(copies_files, 1, tmp_path / "out", [tmp_path / "tokenizer", tmp_path / "config.json"])
    return tmp_path / "out" / "step_000007"


def plain(**overrides: Any) -> nn.Module:
    which = spec(**overrides)
    return which.family.model(which.config)


def test_holds_meta_and_files_and_loads_in_one_process(checkpoint: Path) -> None:
    assert read_meta(checkpoint) == {"stage": "pretrain", "step": 7}
    assert (checkpoint / "tokenizer" / "a.json").read_text() == "{}"
    model = plain()
    load_weights(checkpoint, model)
    full = torch.empty(512, 64)
    from nanovl.parallelisms.init import named_generator

    model.init_parameter("embed_tokens.weight", full, named_generator(1, "embed_tokens.weight"))  # type: ignore[operator]
    assert torch.equal(model.embed_tokens.weight, full)


def test_every_key_at_fault_is_listed(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_weights(checkpoint, plain(num_hidden_layers=3))
    assert "missing model.layers.2.mixer.q_proj.weight" in str(error.value)
    with pytest.raises(CheckpointError) as error:
        load_weights(checkpoint, plain(num_hidden_layers=1))
    assert "unexpected model.layers.1.ffn.down_proj.weight" in str(error.value)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(64,\), the model wants \(32,\)"):
        load_weights(checkpoint, plain(hidden_size=32))


def test_incomplete_and_damaged_checkpoints_are_refused(checkpoint: Path) -> None:
    shard = next((checkpoint / "state").glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has \d+ bytes of \d+; choose an earlier step"):
        load_weights(checkpoint, plain())
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(checkpoint, plain())
    (checkpoint / "state" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(checkpoint, plain())
    (checkpoint / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_meta(checkpoint)
    (checkpoint / "meta.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: meta\.json: no JSON object"):
        read_meta(checkpoint)
    (checkpoint / "meta.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"meta.json says of no model: KeyError\('model'\)"):
        Checkpoint(checkpoint).spec  # noqa: B018
    (checkpoint / "meta.json").unlink()
    assert committed(checkpoint.parent) == []
    shutil.rmtree(checkpoint)


def test_meta_is_written_only_at_the_end(checkpoint: Path) -> None:
    """A copy without meta.json is what a killed save looks like: it is not offered for loading."""
    draft = checkpoint.parent / "step_000008"
    shutil.copytree(checkpoint, draft)
    (draft / "meta.json").rename(draft / "meta.draft.json")
    assert committed(checkpoint.parent) == [checkpoint]
    assert json.loads((draft / "meta.draft.json").read_text())["step"] == 7
