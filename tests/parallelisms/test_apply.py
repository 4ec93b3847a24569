"""What parallelize does to a model, against the same model left alone: same weights, same loss, same gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanovl.config.schema import ActivationCheckpoint, Job, Model, Parallelism
from nanovl.device import Modes
from nanovl.dist import all_reduce, fork_ranks
from nanovl.log import Log
from nanovl.mesh import build_mesh, copy_full
from nanovl.optim.gradients import clip_gradients, global_norm
from nanovl.parallelisms.apply import parallelism_mistakes, parallelize
from nanovl.parallelisms.init import init_weights, materialize, named_generator
from nanovl.parallelisms.memory import apply_activation_checkpointing
from nanovl.registry import resolve_model

CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 3},
    "qwen3 tied": {"num_hidden_layers": 2, "tie_word_embeddings": True},
    "nanochat": {
        "depth": 3,
        "aspect_ratio": 16,
        "head_dim": 16,
        "max_position_embeddings": 32,
        "short_window_multiple": 8,
    },
}
ROWS = 4


def make(name: str) -> nn.Module:
    family = name.split()[0]
    spec = resolve_model(
        Model(name=family, flavor="debug" if family == "qwen3" else "", overrides=SIZES[name]), 500
    )
    return spec.family.model(spec.config)


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.randint(0, 500, (ROWS, 25), generator=torch.Generator().manual_seed(0))
    positions = torch.cat((torch.arange(10), torch.arange(14))).expand(ROWS, 24)
    doc_ids = (torch.arange(24) >= 10).long().expand(ROWS, 24)
    targets = tokens[:, 1:].clone()
    targets[0, :20] = -100  # ranks have unequal numbers of targets
    return tokens[:, :-1], targets, positions, doc_ids


def backward(model: Any, part: slice) -> Tensor:
    tokens, targets, positions, doc_ids = rows()
    weights = (targets >= 0).float() / (targets >= 0).sum()
    loss: Tensor = model(
        tokens[part],
        positions[part],
        doc_ids[part],
        objective=lambda head, x: head.cross_entropy(x, targets[part], weights[part], 16)[0],
    )
    loss.backward()
    return loss.detach()


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Replace the initial weights, of which many are zero and leave others without a gradient."""
    for name, parameter in model.named_parameters():
        full = torch.randn(parameter.shape, generator=named_generator(8, name)) * 0.2
        copy_full(parameter, full)


def on_mesh(
    rank: int, name: str, copies: int, world: int, changes: dict[str, Any], compiled: bool
) -> dict[str, Any]:
    job = Job(**changes)
    job.parallelism.data_parallel_replicate_degree = copies
    mesh = build_mesh(job.parallelism, world, CPU)
    with torch.device("meta"):
        model = make(name)
    parallelize(model, job, mesh, Modes(torch.float32, compiled), Log(1))
    materialize(model, CPU)
    init_weights(model, seed=7)
    weights = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
    shake(model)
    loss = all_reduce(backward(model, slice(mesh.data_rank, None, mesh.data_degree)))
    grads = {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}
    norm = global_norm(model.parameters(), None)
    clip_gradients(model.parameters(), norm, 0.5)
    clipped = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    return {"weights": weights, "loss": loss.item(), "grads": grads, "norm": norm.item(), "clipped": clipped}


def alone(name: str) -> dict[str, Any]:
    model = make(name)
    with torch.no_grad():
        for n, p in model.named_parameters():
            model.init_parameter(n, p, named_generator(7, n))  # type: ignore[operator]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    shake(model)
    loss = backward(model, slice(None)).item()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
    clipped = {n: p.grad for n, p in model.named_parameters()}
    return {"weights": weights, "loss": loss, "grads": grads, "norm": norm, "clipped": clipped}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    for kind in ("grads", "clipped"):
        for name, value in expected[kind].items():
            assert (found[kind][name] - value).abs().max() <= 2e-5 * value.abs().max(), f"{kind} {name}"


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("world", "copies"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_same_weights_loss_and_gradients_on_every_mesh(name: str, world: int, copies: int) -> None:
    expected = alone(name)
    for found in fork_ranks(on_mesh, world, name, copies, world, {}, False):
        assert_same(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpoint": ActivationCheckpoint(mode="full")},
        {"activation_checkpoint": ActivationCheckpoint(mode="selective", every_n_layers=2)},
        {"activation_checkpoint": ActivationCheckpoint(mode="op")},
    ],
    ids=["full", "selective", "op"],
)
@pytest.mark.parametrize("name", ["qwen3", "nanochat"])
def test_recomputing_activations_changes_nothing(name: str, changes: dict[str, Any]) -> None:
    assert_same(fork_ranks(on_mesh, 2, name, 1, 2, changes, False)[0], alone(name))


def calls(mode: str) -> Counter[str]:
    """Operations of one forward and backward."""
    config = ActivationCheckpoint(mode=mode)  # type: ignore[arg-type]
    model = make("qwen3")
    shake(model)
    apply_activation_checkpointing(model, config)  # type: ignore[arg-type]
    with Calls() as seen:
        backward(model, slice(None))
    return seen.counts


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_what_each_mode_computes_again() -> None:
    """3 layers, 7 linears and one attention each; a linear is one mm forward and two backward."""
    none, op, selective, full = (calls(mode) for mode in ("none", "op", "selective", "full"))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert [c[attention] for c in (none, op, selective, full)] == [3, 3, 5, 6]
    again = [c["mm"] - none["mm"] for c in (op, selective, full)]
    # the last linear of a block is not run again: nothing in backward asks for its result
    assert again == [9, 12, 18]


@pytest.mark.parametrize("name", ["qwen3", pytest.param("nanochat", marks=pytest.mark.slow)])
def test_compiled_blocks_compute_the_same(name: str) -> None:
    changes = {"activation_checkpoint": ActivationCheckpoint(mode="selective", every_n_layers=2)}
    found = fork_ranks(on_mesh, 2, name, 1, 2, changes, True, timeout_seconds=280)[0]
    assert_same(found, alone(name))


def log_line(rank: int, mode: str) -> str:
    job = Job(activation_checkpoint=ActivationCheckpoint(mode=mode))  # type: ignore[arg-type]
    lines: list[str] = []
    log = Log(1)
    log.say = lines.append  # type: ignore[method-assign]
    with torch.device("meta"):
        model = make("qwen3")
    parallelize(model, job, build_mesh(job.parallelism, 1, CPU), Modes(torch.bfloat16, False), log)
    return lines[0].strip()


def test_every_applied_step_is_logged_with_a_count() -> None:
    assert (
        fork_ranks(log_line, 1, "none")[0] == "applied   FSDP2 (units): 4; bfloat16 compute, float32 reduce"
    )
    assert fork_ranks(log_line, 1, "selective")[0].startswith(
        "applied   activation checkpointing (blocks): 2, FSDP2 (units): 4"
    )


def pipeline_lines(rank: int, compiled: bool, changes: dict[str, Any]) -> list[str]:
    job = Job(**changes)
    job.parallelism.pipeline_parallel_degree = 2
    job.parallelism.pipeline_parallel_schedule = "ZBVZeroBubble"
    lines: list[str] = []
    log = Log(1)
    log.say = log.warn = lines.append  # type: ignore[method-assign]
    spec = resolve_model(Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": 4}), 500)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    parallelize(model, job, build_mesh(job.parallelism, 2, CPU), Modes(torch.float32, compiled), log)
    return [line.strip() for line in lines[1:]]


@pytest.mark.parametrize(
    ("compiled", "changes", "reason"),
    [
        (False, {}, ""),
        (True, {}, "compiled blocks"),
        (
            False,
            {
                "activation_checkpoint": ActivationCheckpoint(mode="op"),
                "parallelism": Parallelism(fsdp_reshard_after_forward="always"),
            },
            'activation_checkpoint and fsdp_reshard_after_forward = "always"',
        ),
    ],
)
def test_a_schedule_that_cannot_do_what_it_is_for_says_so(
    compiled: bool, changes: dict[str, Any], reason: str
) -> None:
    layout, *warned = fork_ranks(pipeline_lines, 2, compiled, changes)[0]
    assert layout == "pipeline  ZBVZeroBubble over 2 ranks, layers of each stage: [1, 1, 1, 1]"
    expected = (
        f"ZBVZeroBubble cannot part weights' gradients from inputs' with {reason}: results are the same"
    )
    assert [expected in line for line in warned] == [True] * bool(reason)


def cpu_shards_differ(rank: int) -> bool:
    """DTensor's own random init gives every shard of a CPU mesh the same values; ours must not."""
    job = Job()
    mesh = build_mesh(job.parallelism, 2, CPU)
    with torch.device("meta"):
        model = make("qwen3")
    parallelize(model, job, mesh, Modes(torch.float32, False), Log(1))
    materialize(model, CPU)
    init_weights(model, seed=7)
    weight = model.layers["0"].mixer.q_proj.weight.full_tensor()  # type: ignore[union-attr, index]
    return not torch.equal(weight[: len(weight) // 2], weight[len(weight) // 2 :])


def test_shards_hold_different_numbers() -> None:
    assert all(fork_ranks(cpu_shards_differ, 2))


def test_offloading_wants_an_accelerator() -> None:
    job = Job(model=Model(name="qwen3", flavor="debug"), parallelism=Parallelism(enable_cpu_offload=True))
    spec = resolve_model(job.model, 512)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    (line,) = parallelism_mistakes(model, job, 1, torch.device("cpu"))
    assert line.startswith("parallelism.enable_cpu_offload = true: there is no accelerator to offload from")
    assert parallelism_mistakes(model, job, 1, torch.device("cuda")) == []
