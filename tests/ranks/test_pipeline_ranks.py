"""Pipelines against one rank: training, evaluation in between, checkpoints on other meshes, a whole run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import GRADIENT, LOSS, VOCAB, WEIGHT, assert_same, job_of
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nanovl.build import build_model, build_optimizers
from nanovl.checkpoint.hf import save_hf
from nanovl.checkpoint.manager import Checkpointer
from nanovl.config.schema import ActivationCheckpoint, Job
from nanovl.device import Modes
from nanovl.dist import RankFailed, fork_ranks, world_from_env
from nanovl.log import Log
from nanovl.mesh import Mesh, build_mesh
from nanovl.metrics import read_metrics
from nanovl.optim.build import Optimizers
from nanovl.optim.scaling import SizeRules
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.registry import read_job, resolve_model
from nanovl.spec import Batch
from nanovl.step import train_step
from nanovl.trainer import train
from nanovl.verify import compare, made_up_rows, on_one_rank, outcome_on, shake, whole

CPU = torch.device("cpu")
SCHEDULES = [
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]
FAMILIES = ["qwen3", "qwen3 tied", "nanochat"]


def on(schedule: str, ranks: int = 2) -> dict[str, Any]:
    return {"pipeline_parallel_degree": ranks, "pipeline_parallel_schedule": schedule}


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(
    ("world", "schedule"), [(2, "1F1B"), (2, "Interleaved1F1B"), (2, "ZBVZeroBubble"), (4, "1F1B")]
)
def test_pipelines_are_as_one_rank(model: str, world: int, schedule: str) -> None:
    assert_same(job_of(model, local=4 // world, **on(schedule)), model, world, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_with_fsdp_is_as_one_rank(model: str, schedule: str) -> None:
    assert_same(job_of(model, local=1, **on(schedule)), model, 4)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_on_four_ranks_is_as_one_rank(model: str, schedule: str) -> None:
    job = job_of(model, rows=16, local=2, **on(schedule, ranks=4))
    layers = "depth" if "depth" in job.model.overrides else "num_hidden_layers"
    deeper = replace(job.model, overrides={**job.model.overrides, layers: 8})
    assert_job_same(replace(job, model=deeper), 4)


def assert_job_same(job: Job, world: int, *, single: Job | None = None, steps: int = 3) -> None:
    """`job` against one rank, or against `single` there."""
    far = compare(outcome_on(job, world, steps), outcome_on(on_one_rank(single or job), 1, steps))
    assert far.loss < LOSS, far
    assert max(far.gradient, far.norm) < GRADIENT, far
    assert far.weight < WEIGHT, far


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_recomputed_activations_change_nothing(schedule: str) -> None:
    job = replace(job_of("qwen3", **on(schedule)), activation_checkpoint=ActivationCheckpoint(mode="full"))
    assert_same(job, "qwen3", 2, steps=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"pipeline_parallel_layers": [1, 3]},
        {"fsdp_reshard_after_forward": "always", "pipeline_parallel_schedule": "ZBVZeroBubble"},
        {"pipeline_parallel_schedule": "LoopedBFS", "pipeline_parallel_stages_per_rank": 2},
    ],
    ids=["uneven", "gathered each time", "stages named"],
)
def test_options_change_nothing(fields: dict[str, Any]) -> None:
    assert_same(job_of("nanochat", local=1, pipeline_parallel_degree=2, **fields), "nanochat", 4, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_compiled_blocks_change_nothing(schedule: str) -> None:
    job = job_of("qwen3", **on(schedule))
    job.compile.enable = "on"
    assert_same(job, "qwen3", 2, steps=2)


def test_bfloat16_gradients_are_added_up_in_float32() -> None:
    """16 micro-batches: added up in bfloat16 they differ by 3e-3 here."""
    single = job_of("qwen3", rows=16, local=1)
    single.training.mixed_precision_param = "bfloat16"
    job = replace(single, parallelism=job_of("qwen3", **on("InterleavedZeroBubble")).parallelism)
    # the same micro-batches on one rank, so that only the order of adding differs
    expected = outcome_on(single, 1, 1)
    far = compare(outcome_on(job, 2, 1), expected)
    assert far.gradient < 1e-5, far


# --- one rank's tools -------------------------------------------------------------------------------------------------


def made(job: Job) -> tuple[ParallelModel, Mesh, Optimizers]:
    """Model and optimizers on this rank, weights shaken."""
    mesh = build_mesh(job.parallelism, world_from_env().size, CPU)
    spec = resolve_model(job.model, VOCAB)
    modes = Modes(torch.float32, False)
    model = build_model(job, spec, mesh, modes, CPU, Log(1), fresh=True)
    groups = job.optimizer.groups or spec.family.optimizer_groups(spec.config)
    job = replace(
        job,
        optimizer=replace(job.optimizer, groups=groups),
        training=replace(job.training, steps=job.training.steps or 100),
    )
    optimizers = build_optimizers(job, spec, model, SizeRules(0, 0, 100, 1.0, 1.0, 1.0), modes, Log(1))
    shake(model, job.debug.seed)
    return model, mesh, optimizers


def take_steps(
    job: Job, model: ParallelModel, mesh: Mesh, optimizers: Optimizers, steps: range
) -> list[float]:
    mine = range(mesh.data_rank, job.training.global_batch_size, mesh.data_degree)
    local, losses = job.training.local_batch_size or len(mine), []
    for step in steps:
        optimizers.set_schedule(step)
        parts = [mine[i : i + local] for i in range(0, len(mine), local)]
        batches = [made_up_rows(job, VOCAB, step, part) for part in parts]
        losses.append(train_step(model, batches, max_norm=0.5, chunk_tokens=16).loss)
        optimizers.step()
        optimizers.zero_grad()
    return losses


# --- evaluation -------------------------------------------------------------------------------------------------------


def nats(head: Any, x_BTD: Tensor, batch: Batch) -> Tensor:
    loss: Tensor = head.cross_entropy(x_BTD, batch["targets_BT"], batch["weights_BT"], 16)[0]
    return loss


def evaluate_between_steps(rank: int, job: Job) -> tuple[bool, list[float | None], list[float]]:
    """Evaluations of three shapes, between and before steps."""
    model, mesh, optimizers = made(job)
    shapes = [(2, 32), (3, 16), (1, 8)]
    found: list[float | None] = []
    losses: list[float] = []
    for step in range(2):
        for rows, tokens in shapes:
            batch = {
                key: value[:, :tokens] for key, value in made_up_rows(job, VOCAB, 9, range(rows)).items()
            }
            value = model.evaluate(batch, nats)
            found.append(None if value is None else value.item())
        losses += take_steps(job, model, mesh, optimizers, range(step, step + 1))
    return mesh.rank("pp") == mesh.size("pp") - 1, found, losses


@pytest.mark.parametrize(
    ("model", "schedule"),
    [("nanochat", "Interleaved1F1B"), ("qwen3 tied", "1F1B"), ("qwen3 tied", "ZBVZeroBubble")],
)
def test_evaluations_of_any_shape_between_steps(model: str, schedule: str) -> None:
    ((_, expected, expected_losses),) = fork_ranks(evaluate_between_steps, 1, on_one_rank(job_of(model)))
    of_a_v = schedule == "ZBVZeroBubble"
    for last_rank, found, losses in fork_ranks(evaluate_between_steps, 2, job_of(model, **on(schedule))):
        assert losses == pytest.approx(expected_losses, rel=LOSS)
        # a V begins and ends on the first rank
        assert found == (pytest.approx(expected, rel=LOSS) if last_rank != of_a_v else [None] * len(expected))


# --- the loss by hand -------------------------------------------------------------------------------------------------


def gradient_of_a_flat_model(rank: int, job: Job) -> dict[str, Any]:
    """All weights 0 but the final norm's: every probability is 1 / V."""
    model, _, _ = made(job)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.zero_()
    rows = torch.tensor([[0, 1, 2, 3]])
    batch = {
        "tokens_BT": rows,
        "targets_BT": torch.tensor([[5, -100, 6, 7]]),
        "positions_BT": torch.arange(4)[None],
        "doc_ids_BT": torch.zeros_like(rows),
        "weights_BT": torch.tensor([[1.0, 9.0, 2.0, 1.0]]),
    }
    other = {**batch, "targets_BT": torch.tensor([[-100, -100, 4, -100]])}
    result = train_step(model, [batch, other], max_norm=0.0, chunk_tokens=3)
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": result.loss,
        "norm": result.grad_norm,
        "grads": {n: g.abs().max().item() for n, g in grads.items()},
    }


def test_the_loss_is_a_mean_over_all_micro_batches() -> None:
    """Weights 1 + 2 + 1 in one micro-batch, 2 in the other: each token counts weight / 6, whatever the stages.

    With all weights 0 the hidden states are 0, so each token costs ln 96 and no gradient arrives anywhere.
    """
    for found in fork_ranks(gradient_of_a_flat_model, 2, job_of("qwen3", **on("1F1B"))):
        assert found["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
        assert found["norm"] == 0.0


def head_gradient(rank: int, job: Job) -> Tensor | None:
    """Gradient of the head where hidden states are 1 at every token: the last norm's weights 1, its input constant."""
    model, _, _ = made(job)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name in ("embed_tokens.weight", "norm.weight") else 0.0)
    rows = torch.tensor([[0, 1, 2, 3]])
    batch = {
        "tokens_BT": rows,
        "targets_BT": torch.tensor([[5, -100, 6, 5]]),
        "positions_BT": torch.arange(4)[None],
        "doc_ids_BT": torch.zeros_like(rows),
        "weights_BT": torch.tensor([[1.0, 9.0, 2.0, 1.0]]),
    }
    other = {**batch, "targets_BT": torch.tensor([[-100, -100, 5, -100]])}
    train_step(model, [batch, other], max_norm=0.0, chunk_tokens=3)
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return grads.get("lm_head.weight")


def test_gradients_are_divided_by_the_weights_of_the_step_once() -> None:
    """d loss / d W_v = sum_t w_t / 6 (1 / 96 - [v = target]) x_t with x_t = 1: for v = 5 it is 1/96 - 4/6, for 6
    1/96 - 2/6, for others 1/96; torchtitan multiplied by the tokens here."""
    _, found = fork_ranks(head_gradient, 2, job_of("qwen3", **on("1F1B")))
    assert found is not None
    expected = torch.full((VOCAB,), 1 / 96)
    expected[5] -= 4 / 6
    expected[6] -= 2 / 6
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_and_go_on(rank: int, job: Job, folder: Path, background: bool) -> list[float]:
    model, mesh, optimizers = made(job)
    take_steps(job, model, mesh, optimizers, range(2))
    checkpointer = Checkpointer(folder, model.whole, optimizers.optimizers, 0, background, Log(1))
    checkpointer.save(2, {}, {}, [])
    losses = take_steps(job, model, mesh, optimizers, range(2, 4))
    checkpointer.wait()
    return losses


def load_and_go_on(rank: int, job: Job, folder: Path) -> list[float]:
    model, mesh, optimizers = made(job)
    Checkpointer(folder, model.whole, optimizers.optimizers, 0, False, Log(1)).load(folder / "step_000002")
    return take_steps(job, model, mesh, optimizers, range(2, 4))


@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        ("qwen3 tied", "1F1B"),
        ("nanochat", "Interleaved1F1B"),
        pytest.param("qwen3 tied", "ZBVZeroBubble", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_move_between_meshes(tmp_path: Path, model: str, schedule: str) -> None:
    pipeline, sharded = job_of(model, local=1, **on(schedule)), job_of(model, local=1)
    there = fork_ranks(save_and_go_on, 4, pipeline, tmp_path / "pp", False)
    assert all(losses == there[0] for losses in there)
    for job, world in ((on_one_rank(sharded), 1), (sharded, 4)):
        for losses in fork_ranks(load_and_go_on, world, job, tmp_path / "pp"):
            assert losses == pytest.approx(there[0], rel=LOSS)
    back = fork_ranks(save_and_go_on, 2, sharded, tmp_path / "fsdp", True)[0]
    for losses in fork_ranks(load_and_go_on, 2, pipeline, tmp_path / "fsdp"):
        assert losses == pytest.approx(back, rel=LOSS)


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    fork_ranks(save_and_go_on, 2, job_of("qwen3 tied", **on("1F1B")), tmp_path, False)
    metadata = FileSystemReader(tmp_path / "step_000002" / "state").read_metadata()
    keys = [key for key in metadata.state_dict_metadata if key.startswith("model.")]
    assert "model.embed_tokens.weight" in keys
    assert "model.lm_head.weight" not in keys
    assert len([i for i in metadata.storage_data if i.fqn == "model.embed_tokens.weight"]) == 1


def load_too_many_layers(rank: int, job: Job, folder: Path) -> None:
    model, _, optimizers = made(job)
    Checkpointer(folder, model.whole, optimizers.optimizers, 0, False, Log(1)).load(folder / "step_000002")


def test_what_no_stage_wants_and_what_any_stage_lacks_is_said_on_every_rank(tmp_path: Path) -> None:
    fork_ranks(save_and_go_on, 2, job_of("qwen3", **on("1F1B")), tmp_path, False)
    for layers, said in ((6, "missing model.layers.5."), (2, "unexpected model.layers.3.")):
        job = job_of("qwen3", **on("1F1B"))
        job.model = replace(job.model, overrides={"num_hidden_layers": layers})
        with pytest.raises(RankFailed) as error:
            fork_ranks(load_too_many_layers, 2, job, tmp_path)
        assert said in str(error.value)
        assert "missing model.layers.1." not in str(error.value)
        assert "unexpected model.embed_tokens" not in str(error.value)


def write_hugging_face(rank: int, job: Job, folder: Path) -> None:
    model, _, _ = made(job)
    save_hf(
        folder,
        {n: whole(p) for n, p in model.named_parameters()},
        resolve_model(job.model, VOCAB),
        torch.float32,
    )


def losses_from_hugging_face(rank: int, job: Job) -> list[float]:
    mesh = build_mesh(job.parallelism, world_from_env().size, CPU)
    spec = resolve_model(job.model, VOCAB)
    model = build_model(job, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    rows = [made_up_rows(job, VOCAB, 0, range(i, i + 2)) for i in (0, 2)]
    return [train_step(model, rows, max_norm=0.0, chunk_tokens=16).loss]


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_stages_begin_with_weights_of_hugging_face(tmp_path: Path, schedule: str) -> None:
    fork_ranks(write_hugging_face, 1, on_one_rank(job_of("qwen3 tied")), tmp_path / "hf")
    job = job_of("qwen3 tied", rows=4, **on(schedule))
    job.checkpoint.initial_load_path = str(tmp_path / "hf")
    (expected,) = fork_ranks(losses_from_hugging_face, 1, on_one_rank(job))
    for losses in fork_ranks(losses_from_hugging_face, 2, job):
        assert losses == pytest.approx(expected, rel=LOSS)


# --- a whole run ------------------------------------------------------------------------------------------------------

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"


def train_rank(rank: int, job: Job, resume: bool) -> None:
    train(job, resume=resume)


def run(folder: Path, world: int, flags: list[str], *, resume: bool = False) -> list[float]:
    job = read_job([CONFIG], [*flags, f"--job.run_dir={folder}"], world_size=world)
    fork_ranks(train_rank, world, job, resume)
    return [r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]


def test_a_run_trains_validates_samples_and_goes_on_elsewhere(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [
        *tiny_flags,
        "--training.steps=6",
        "--training.local_batch_size=2",
        "--checkpoint.interval=3",
        "--validation.freq=3",
        "--validation.max_bytes=2000",
        "--validation.final_max_bytes=3000",
        '--sampling.prompts=["The "]',
        "--sampling.max_tokens=4",
    ]
    pipeline = [*flags, "--parallelism.pipeline_parallel_degree=2"]
    expected = run(tmp_path / "one", 1, flags)
    losses = run(tmp_path / "pp", 2, pipeline)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "pp" / "evals").iterdir()) == [
        "step_000003.json",
        "step_000006.json",
    ]
    texts, bpb = ({name: read(tmp_path / name) for name in ("pp", "one")} for read in (samples, last_bpb))
    assert texts["pp"] == texts["one"]
    assert bpb["pp"] == pytest.approx(bpb["one"], rel=1e-6)
    for saved, resumed, world, its_flags in (("pp", "on one", 1, flags), ("one", "on two", 2, pipeline)):
        shutil.copytree(tmp_path / saved, tmp_path / resumed)
        shutil.rmtree(tmp_path / resumed / "checkpoints" / "step_000006")
        again = run(tmp_path / resumed, world, its_flags, resume=True)
        assert again == pytest.approx(expected, rel=1e-5)


def samples(folder: Path) -> list[str]:
    return [json.loads(line)["completion"] for line in (folder / "samples.jsonl").read_text().splitlines()]


def last_bpb(folder: Path) -> float:
    return float(json.loads((folder / "evals" / "step_000006.json").read_text())["val/bpb"])
