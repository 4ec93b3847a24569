"""Experts on any mesh against one rank."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import MODELS_WITH_EXPERTS, VOCAB, assert_same, job_of
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nanovl.build import build_model
from nanovl.config.schema import ActivationCheckpoint, Job, Model, OptimizerGroup, Parallelism
from nanovl.device import Modes
from nanovl.dist import fork_ranks
from nanovl.errors import ConfigError
from nanovl.inference.engine import Engine
from nanovl.inference.load import load
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.metrics import read_metrics
from nanovl.models.blocks.moe import Moe, MoeConfig
from nanovl.optim.expert_balance import ExpertBalance
from nanovl.parallelisms.apply import parallelism_mistakes
from nanovl.parallelisms.expert import apply_expert_parallel, expert_placement
from nanovl.registry import read_job, resolve_model
from nanovl.spec import expert_layers
from nanovl.step import train_step
from nanovl.trainer import train
from nanovl.verify import compare, made_up_rows, on_one_rank, outcome_on, shake, whole

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
TP2, EP2 = {"tensor_parallel_degree": 2}, {"expert_parallel_degree": 2}
ETP2 = {"expert_tensor_parallel_degree": 2, **TP2}
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, EP2),
    "tp2": (2, TP2),
    "ep2 x fsdp2": (4, EP2),
    "ep2 x hsdp": (4, {**EP2, "data_parallel_replicate_degree": 2}),
    "ep2 over tp2": (2, {**TP2, **EP2}),
    "ep4 over tp2 x fsdp2": (4, {**TP2, "expert_parallel_degree": 4}),
    "etp2": (2, ETP2),
    "ep2 x etp2": (4, {**EP2, **ETP2}),
    "ep2 over cp2": (2, {"context_parallel_degree": 2, **EP2}),
}
EVERY_DAY = {
    ("moe", "ep2 x fsdp2"),
    ("moe sigmoid", "ep4 over tp2 x fsdp2"),
    ("moe sigmoid", "etp2"),
    ("gpt_oss", "ep2 x etp2"),
}


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        pytest.param(model, mesh, marks=[] if (model, mesh) in EVERY_DAY else [pytest.mark.slow])
        for model in MODELS_WITH_EXPERTS
        for mesh in MESHES
    ],
)
def test_same_as_one_rank(model: str, mesh: str) -> None:
    world, fields = MESHES[mesh]
    assert_same(job_of(model, **fields), model, world)


@pytest.mark.parametrize("mode", ["full", pytest.param("op", marks=pytest.mark.slow)])
def test_recomputed_blocks_are_the_same(mode: Any) -> None:
    # 4 ranks: FSDP gathers experts again in the recomputed forward
    job = replace(job_of("moe sigmoid", **EP2), activation_checkpoint=ActivationCheckpoint(mode=mode))
    assert_same(job, "moe sigmoid", 4)


@pytest.mark.slow
def test_muon_on_experts_is_the_same() -> None:
    job = job_of("moe", **EP2)
    muon = OptimizerGroup(match=r"layers\..*_proj(\.weight)?", kind="muon", lr=0.02)
    job.optimizer.groups = [muon, OptimizerGroup(match=".*")]
    expected = outcome_on(on_one_rank(job), 1, 3)
    found = outcome_on(job, 4, 3)
    for name, weight in expected.weights.items():
        assert (found.weights[name] - weight).norm() < 1e-4 * weight.norm(), name


@pytest.mark.slow
def test_bfloat16_is_near() -> None:
    job = job_of("moe", **EP2)
    job = replace(job, training=replace(job.training, mixed_precision_param="bfloat16"))
    one, two = outcome_on(on_one_rank(job), 1, 1), outcome_on(job, 2, 1)
    assert two.losses == pytest.approx(one.losses, rel=1e-3)


def layer_on_rank(rank: int, world: int, fields: dict[str, Any]) -> list[tuple[Tensor, tuple[Any, ...]]]:
    """Rank r has one token x = r + 1, D = 1, all weights 1 but the router's: expert 0 gets everything.

    expert(x) = relu(x)^2 x = x^3 and the weight is sigmoid(x ln 3), so d(sum of outputs)/d(down of expert 0) is
    sum of sigmoid(x ln 3) x^3 over all tokens of all ranks; expert 1 has none and its gradient is 0.
    """
    mesh = build_mesh(Parallelism(**fields), world, CPU)
    config = MoeConfig(
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=1,
        activation="relu2",
        scoring="sigmoid",
        norm_topk_prob=False,
    )
    moe: Any = Moe(config, 1)
    for parameter in moe.parameters():
        nn.init.ones_(parameter)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[3.0], [1 / 3]]).log())
    apply_expert_parallel(moe, Parallelism(**fields), mesh)
    fully_shard(moe.experts, mesh=mesh.experts)
    fully_shard(moe, mesh=mesh.fsdp)
    for module in moe.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    moe(torch.tensor([[[rank + 1.0]]])).sum().backward()
    down = moe.experts.down_proj
    return [(whole(down.grad), down.placements), (whole(moe.router.weight.grad), ())]


@pytest.mark.parametrize(
    ("world", "fields", "placements"),
    [
        (2, {}, (Shard(0),)),
        (2, EP2, (Shard(0), Shard(0))),
        (4, EP2, (_StridedShard(0, split_factor=2), Shard(0))),
    ],
)
def test_gradients_of_an_expert_are_sums_over_all_tokens(
    world: int, fields: dict[str, Any], placements: tuple[Any, ...]
) -> None:
    down = {2: 0.75 * 1 + 0.9 * 8, 4: 0.75 * 1 + 0.9 * 8 + 27 / 28 * 27 + 81 / 82 * 64}[world]
    # d/d(router) = sum of x^3 sigmoid' x
    router = {2: 0.75 * 0.25 + 0.9 * 0.1 * 16}
    router[4] = router[2] + 27 / 28**2 * 81 + 81 / 82**2 * 256
    for (gradient, placed), (router_gradient, _) in fork_ranks(layer_on_rank, world, world, fields):
        torch.testing.assert_close(gradient.flatten(), torch.tensor([down, 0.0]))
        torch.testing.assert_close(router_gradient.flatten(), torch.tensor([router[world], 0.0]))
        assert placed[-1] == placements[-1]
        assert len(placed) == len(placements)


def loads_on_rank(rank: int, job: Job, world: int) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Metrics and biases of three steps, with an evaluation after each, and the last step skipped."""
    mesh = build_mesh(job.parallelism, world, CPU)
    spec = resolve_model(job.model, VOCAB)
    model = build_model(job, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    shake(model, 1)
    balance = ExpertBalance(model.whole, mesh)
    rows = list(range(mesh.data_rank, job.training.global_batch_size, mesh.data_degree))
    found, biases = [], []
    for step in range(3):
        balance.begin_step(job.training.global_batch_size * job.training.seq_len)
        batches = [made_up_rows(job, VOCAB, step, rows[i : i + 2]) for i in range(0, len(rows), 2)]
        train_step(model, batches, max_norm=1.0, chunk_tokens=16)
        balance.end_step(update=step < 2)
        found.append(balance.metrics())
        biases.append(torch.stack([layer.router.expert_bias for layer in balance.layers]))
        model.evaluate(batches[0], lambda head, x, batch: None)
    return found, biases


@pytest.mark.parametrize(
    ("world", "fields"), [(2, EP2), (4, {**TP2, **EP2}), (2, {**ETP2}), (2, {"context_parallel_degree": 2})]
)
def test_loads_and_biases_are_exact_on_every_mesh(world: int, fields: dict[str, Any]) -> None:
    job = job_of("moe sigmoid", **fields)
    ((metrics, biases),) = fork_ranks(loads_on_rank, 1, on_one_rank(job), 1)
    assert biases[0].abs().max() == 0.001
    assert torch.equal(biases[1], biases[2])  # the skipped step
    assert not torch.equal(biases[0], biases[1])
    assert metrics[0]["moe/max_load"] > 1
    for theirs, their_biases in fork_ranks(loads_on_rank, world, job, world):
        for a, b in zip(theirs, metrics, strict=True):
            assert a == pytest.approx(b, rel=1e-6)
            assert a["moe/max_load"] == b["moe/max_load"]
        for a, b in zip(their_biases, biases, strict=True):
            assert torch.equal(a, b)


def placements_on_rank(rank: int, experts: int) -> set[Any]:
    mesh = build_mesh(Parallelism(), 4, CPU)
    moe: Any = Moe(MoeConfig(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=8), 4)
    fully_shard(moe, mesh=mesh.fsdp, shard_placement_fn=expert_placement(moe, mesh))
    return {parameter.placements for parameter in moe.experts.parameters()}


def test_experts_that_are_fewer_than_ranks_are_cut_by_channels() -> None:
    assert fork_ranks(placements_on_rank, 4, 3)[0] == {(Shard(1),)}
    assert fork_ranks(placements_on_rank, 4, 4)[0] == {(Shard(0),)}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, EP2], ids=["fsdp4", "ep2 x fsdp2"])
def test_few_experts_are_the_same(fields: dict[str, int]) -> None:
    job = deepcopy(job_of("moe", **fields))
    job.model.overrides["blocks"]["full"]["ffn"]["num_experts"] = 2
    far = compare(outcome_on(job, 4, 3), outcome_on(on_one_rank(job), 1, 3))
    assert max(far.loss, far.gradient, far.weight) < 1e-5, far


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qwen3", EP2, "expert_parallel_degree = 2: qwen3 has no experts; set it to 1"),
        ("qwen3", ETP2, "expert_tensor_parallel_degree = 2: qwen3 has no experts"),
        (
            "qwen3_moe",
            {"expert_parallel_degree": 3},
            "expert_parallel_degree = 3 does not divide the 8 experts; use 2 or 4",
        ),
        (
            "qwen3_moe",
            {"expert_tensor_parallel_degree": 5},
            "expert_tensor_parallel_degree = 5 does not divide the 32 channels of an expert; use 2 or 4",
        ),
    ],
)
def test_degrees_that_experts_do_not_allow_are_said(name: str, fields: dict[str, int], message: str) -> None:
    job = Job(model=Model(name=name, flavor="debug"), parallelism=Parallelism(**fields))
    with torch.device("meta"):
        spec = resolve_model(job.model, 64)
        model = spec.family.model(spec.config)
    (found,) = (m for m in parallelism_mistakes(model, job, 12, CPU) if "expert" in m)
    assert found.startswith(f"parallelism.{message}")


def train_rank(rank: int, job: Job, resume: bool) -> None:
    train(job, resume=resume)


def test_a_run_balances_logs_and_goes_on_elsewhere(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [
        *tiny_flags,
        "--model.name=qwen3_moe",
        "--model.blocks.full.ffn.load_balancing=bias",
        "--model.blocks.full.ffn.aux_loss_coef=0.01",
        "--lr_schedule.kind=constant",
    ]

    def run(name: str, steps: int, world: int) -> list[tuple[float, float, float]]:
        more = [f"--job.run_dir={tmp_path / name}", f"--training.steps={steps}"]
        job = read_job(
            [CONFIG], [*flags, *more, f"--parallelism.expert_parallel_degree={world}"], world_size=world
        )
        fork_ranks(train_rank, world, job, (tmp_path / name).exists())
        records = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in r]
        assert all(r["moe/max_load"] >= 1 and r["moe/dead_experts"] >= 0 for r in records)
        return [(r["train/loss"], r["moe/max_load"], r["moe/router_entropy"]) for r in records]

    whole = run("whole", 3, 1)
    run("moved", 2, 2)
    assert run("moved", 3, 1) == [pytest.approx(record, rel=1e-5) for record in whole]
    loaded = load(tmp_path / "moved", device="cpu", dtype="bfloat16")
    biases = [layer.router.expert_bias for layer in expert_layers(loaded.model)]
    assert all(bias.dtype == torch.float32 and bias.any() for bias in biases)
    assert len(Engine(loaded).generate([[1, 2, 3]], max_tokens=2)[0].ids) == 2


def test_expert_errors_reach_the_user(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [*tiny_flags, f"--job.run_dir={tmp_path / 'run'}", "--parallelism.expert_parallel_degree=1"]
    job = read_job([CONFIG], flags)
    job.parallelism.expert_parallel_degree = 2
    with pytest.raises(ConfigError, match="qwen3 has no experts"):
        train(job)
