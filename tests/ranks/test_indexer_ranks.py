"""Sparse attention on several ranks: the gradients of predictions and of the indexer's loss equal those of one rank."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import degrees
from meshes import EXPERTS, GRADIENT, LOSS, VOCAB, WEIGHT, job_of
from torch import Tensor

from nanovl.build import build_model
from nanovl.checkpoint.hf import save_hf
from nanovl.checkpoint.tensors import named_weights
from nanovl.config.schema import ActivationCheckpoint, Checkpoint, Job, Model, Parallelism
from nanovl.device import Modes
from nanovl.dist import fork_ranks
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.optim.index_loss import IndexLosses
from nanovl.parallelisms.apply import parallelism_mistakes
from nanovl.parallelisms.init import init_weights
from nanovl.registry import resolve_model
from nanovl.step import train_step
from nanovl.verify import Outcome, compare, made_up_rows, on_one_rank, outcome_on, shake, whole

CPU = torch.device("cpu")


def mixer(index_loss: str) -> dict[str, Any]:
    """With few index heads scores tie at 0, and ties are broken by rounding."""
    indexer = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 6, "index_loss": index_loss}
    return {
        "kind": "mla",
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "indexer": indexer,
    }


def model_of(index_loss: str) -> Model:
    blocks = {"full": {"mixer": mixer(index_loss), "ffn": EXPERTS}}
    return Model(name="qwen3_moe", flavor="debug", overrides={"num_hidden_layers": 2, "blocks": blocks})


MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2": degrees(tp=2),
    "fsdp 2": degrees(shard=2),
    "pp 2": degrees(pp=2),
    "pp 2, split backward": (
        2,
        {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
    ),
    "cp 2": degrees(cp=2),
    "tp 2, cp 2": degrees(tp=2, cp=2),
    "tp 2, ep 2, fsdp 2": degrees(tp=2, ep=2, shard=2),
}
EVERY_DAY = {("sparse", "tp 2, cp 2"), ("dense", "pp 2")}


def job(index_loss: str, mesh: str) -> Job:
    asked = replace(job_of("qwen3", rows=8, local=2, **MESHES[mesh][1]), model=model_of(index_loss))
    if "split" in mesh:  # two stages a rank
        asked.model.overrides["num_hidden_layers"] = 4
    return asked


@cache
def on_one(index_loss: str, layers: int) -> Outcome:
    one = on_one_rank(job(index_loss, "fsdp 2"))
    one.model.overrides["num_hidden_layers"] = layers
    return outcome_on(one, 1, 3)


def assert_same(asked: Job, index_loss: str, world: int) -> None:
    expected = on_one(index_loss, asked.model.overrides["num_hidden_layers"])
    found = outcome_on(asked, world, 3)
    assert found.initial == expected.initial
    assert (
        sum("indexer" in name for name in found.gradients) == 5 * asked.model.overrides["num_hidden_layers"]
    )
    assert all(gradient.any() for gradient in found.gradients.values())
    far = compare(found, expected)
    assert far.loss < LOSS, far
    assert far.gradient < GRADIENT, far
    assert far.weight < WEIGHT, far


@pytest.mark.parametrize(
    ("index_loss", "mesh"),
    [
        pytest.param(index_loss, mesh, marks=[] if (index_loss, mesh) in EVERY_DAY else [pytest.mark.slow])
        for index_loss in ("sparse", "dense")
        for mesh in MESHES
    ],
)
def test_same_as_one_rank(index_loss: str, mesh: str) -> None:
    assert_same(job(index_loss, mesh), index_loss, MESHES[mesh][0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "op"])
def test_recomputed_layers_are_the_same(mode: Any) -> None:
    asked = replace(job("sparse", "fsdp 2"), activation_checkpoint=ActivationCheckpoint(mode=mode))
    assert_same(asked, "sparse", 2)


def losses_on_rank(rank: int, asked: Job, world: int) -> list[dict[str, float]]:
    """Metrics of two steps, with an evaluation between."""
    mesh = build_mesh(asked.parallelism, world, CPU)
    spec = resolve_model(asked.model, VOCAB)
    model = build_model(asked, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    shake(model, 1)
    losses, found = IndexLosses(model.whole, mesh), []
    rows = list(range(mesh.data_rank, asked.training.global_batch_size, mesh.data_degree))
    for step in range(2):
        losses.begin_step(asked.training.global_batch_size * asked.training.seq_len)
        batches = [made_up_rows(asked, VOCAB, step, rows[i : i + 2]) for i in range(0, len(rows), 2)]
        train_step(model, batches, max_norm=1.0, chunk_tokens=16)
        losses.end_step()
        found.append(losses.metrics())
        model.evaluate(batches[0], lambda head, x, batch: None)
    return found


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=[] if m == "tp 2" else [pytest.mark.slow]) for m in MESHES]
)
def test_the_loss_that_is_logged_is_that_of_the_whole_job(mesh: str) -> None:
    asked = job("sparse", mesh)
    (expected,) = fork_ranks(losses_on_rank, 1, on_one_rank(asked), 1)
    assert all(0.01 < step["indexer/kl"] <= step["indexer/kl_max"] for step in expected)
    for found in fork_ranks(losses_on_rank, MESHES[mesh][0], asked, MESHES[mesh][0]):
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def grown_on_rank(rank: int, asked: Job, world: int) -> dict[str, Tensor]:
    mesh = build_mesh(asked.parallelism, world, CPU)
    spec = resolve_model(asked.model, 512)
    model = build_model(asked, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def test_a_dense_model_of_hugging_face_grows_an_indexer_on_every_mesh(tmp_path: Path) -> None:
    """Its weights are there, and the indexer's are those of a fresh model."""
    given = resolve_model(Model(name="deepseek_v3", flavor="debug"), 512)
    theirs = given.family.model(given.config)
    init_weights(theirs, 7)
    save_hf(tmp_path, named_weights(theirs), given, torch.float32)
    asked = Job(
        model=Model(name="deepseek_v32", flavor="debug"), parallelism=Parallelism(tensor_parallel_degree=2)
    )
    asked.checkpoint = Checkpoint(initial_load_path=str(tmp_path), initial_load_grow=True)
    wanted = resolve_model(asked.model, 512)
    fresh = wanted.family.model(wanted.config)
    init_weights(fresh, asked.debug.seed)
    expected = {**dict(fresh.named_parameters()), **dict(theirs.named_parameters())}
    for found in fork_ranks(grown_on_rank, 2, asked, 2):
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_keys_are_chosen_among_all_of_a_row(method: Any) -> None:
    parallelism = Parallelism(context_parallel_degree=2, context_parallel_method=method)
    asked = Job(model=model_of("sparse"), parallelism=parallelism)
    spec = resolve_model(asked.model, 64)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    (found,) = parallelism_mistakes(model, asked, 2, CPU)
    assert found.startswith(
        f"parallelism.context_parallel_method = '{method}': an indexer chooses among all keys"
    )
    assert found.endswith("use 'allgather'")
