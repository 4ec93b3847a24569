"""The optimizers of a job: schedules written into groups, checkpoints, and real FSDP shards."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nanovl import log
from nanovl.config import schema
from nanovl.config.schema import OptimizerGroup as Group
from nanovl.dist import fork_ranks
from nanovl.optim.build import Optimizers
from nanovl.optim.muon import Muon

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
SCHEDULE = schema.LrSchedule(kind="wsd", warmup_steps=2, decay_ratio=0.5, min_lr_factor=0.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Tiny(nn.Module):
    """Odd sizes on purpose: nothing divides by 4, and one parameter has a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 11, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator).mul_(0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x) * self.scale
        return self.head(x)


MATRICES = r"layers\..*\.weight"
GROUPS = [
    Group(match=r"head\.weight", lr=0.01, beta1=0.8, weight_decay=0.02, scale_with_width=True),
    Group(match=MATRICES, kind="muon", lr=0.02, weight_decay=0.2, weight_decay_schedule="linear"),
    Group(match=r"scale", lr=0.5, weight_decay=0.0, scale_with_batch=False),
    Group(match=r".*"),
]


def build(model: nn.Module, steps: int = 8, **changes: Any) -> Optimizers:
    implementation = changes.pop("implementation", "fused")
    optimizer = schema.Optimizer(lr=0.004, weight_decay=0.1, implementation=implementation)
    return Optimizers(
        model.named_parameters(), changes.pop("groups", GROUPS), optimizer, SCHEDULE, steps=steps, **changes
    )


def train(model: nn.Module, optimizers: Optimizers, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizers.set_schedule(step)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


def options(optimizers: Optimizers) -> dict[str, dict[str, Any]]:
    """Param group options by the group's pattern."""
    return {
        peak.assigned.config.match: {k: v for k, v in group.items() if k != "params"}
        for optimizer, peaks in zip(optimizers.optimizers, optimizers._written, strict=True)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True)
    }


def test_factors_and_defaults_reach_the_groups() -> None:
    made = build(Tiny(), width_factor=2.0, batch_factor=0.5, decay_factor=3.0)
    made.set_schedule(1)
    head, muon, scale, rest = (options(made)[group.match] for group in GROUPS)
    assert head["lr"] == pytest.approx(0.01 * 2 * 0.5)
    assert head["betas"] == (0.8, 0.95)
    assert (head["eps"], head["weight_decay"]) == (1e-8, 0.02)
    assert scale["lr"] == 0.5
    assert rest["lr"] == pytest.approx(0.004 * 0.5)
    assert (rest["betas"], rest["weight_decay"]) == ((0.9, 0.95), 0.1)
    assert muon["lr"] == pytest.approx(0.02 * 0.5)
    assert muon["beta2"] == 0.9
    assert muon["weight_decay"] == pytest.approx(0.2 * 3 * 7 / 8)


def test_set_schedule_writes_the_step_about_to_be_taken() -> None:
    made = build(Tiny())
    seen = []
    for step in (0, 1, 4, 6, 8, 20):
        made.set_schedule(step)
        muon = options(made)[MATRICES]
        seen.append((muon["lr"] / 0.02, muon["weight_decay"] / 0.2))
        assert options(made)[".*"]["weight_decay"] == 0.1
    expected = [(0.5, 1.0), (1.0, 7 / 8), (1.0, 0.5), (0.5, 0.25), (0, 0), (0, 0)]
    assert seen == [pytest.approx(pair) for pair in expected]
    made.set_schedule(6)
    # momentum: 6 of 400 warm-up steps, and half way of the fall to 0.90
    warm = 0.85 + 0.12 * 6 / 400
    assert options(made)[MATRICES]["momentum"] == pytest.approx((warm + 0.90) / 2)
    assert made.lr == pytest.approx(0.02 * 0.5)  # the muon group has the most elements


def test_options_of_groups_are_not_ignored() -> None:
    groups = [
        Group(match=MATRICES, kind="muon", beta2=0.7),
        Group(match=".*", lr=0.5, beta1=0.1, beta2=0.2, weight_decay=0.3, weight_decay_schedule="cosine"),
    ]
    made = build(Tiny(), groups=groups)
    made.set_schedule(4)
    muon, adamw = (options(made)[group.match] for group in groups)
    assert (muon["lr"], muon["beta2"]) == (0.004, 0.7)
    assert (adamw["lr"], adamw["betas"]) == (0.5, (0.1, 0.2))
    assert adamw["weight_decay"] == pytest.approx(0.15)


def test_the_table_lists_every_group() -> None:
    header, rows = build(Tiny()).table()
    text = log.table(header, rows)
    assert [row[2:4] for row in rows] == [[1, 66], [6, 360], [1, 1], [7, 114]]
    assert "peak lr" in text
    assert "adamw" in text


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_each_implementation_runs_and_agrees(implementation: str) -> None:
    model, plain = Tiny(), Tiny()
    made = build(model, implementation=implementation)
    adamw = made.optimizers[0]
    assert (adamw.defaults["fused"], adamw.defaults["foreach"]) == (
        implementation == "fused",
        implementation == "foreach",
    )
    train(model, made, range(4))
    train(plain, build(plain), range(4))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_only_the_optimizers_that_are_needed_exist() -> None:
    model = Tiny()
    assert [type(o) for o in build(model).optimizers] == [torch.optim.AdamW, Muon]
    assert [type(o) for o in build(model, groups=[Group(match=".*")]).optimizers] == [torch.optim.AdamW]
    model.embed.requires_grad_(False)
    frozen = [Group(match="embed.*", kind="muon"), Group(match=".*")]
    assert [type(o) for o in build(model, groups=frozen).optimizers] == [torch.optim.AdamW]


@pytest.mark.parametrize(("stage", "kinds"), [("embed", [torch.optim.AdamW]), ("layers", [Muon]), ("", [])])
def test_a_stage_has_the_optimizers_of_its_own_parameters(stage: str, kinds: list[type]) -> None:
    model = Tiny()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    held = [(n, p) for n, p in model.named_parameters() if stage and n.startswith(stage) and p.ndim > 1]
    made = Optimizers(held, GROUPS, schema.Optimizer(), SCHEDULE, steps=8, all_sizes=sizes)
    assert [row[2:4] for row in made.table()[1]] == [
        row[2:4] for row in build(Tiny()).table()[1]
    ]  # of the whole model
    assert [type(optimizer) for optimizer in made.optimizers] == kinds
    for _, parameter in held:
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    made.set_schedule(0)
    made.step()
    made.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in held}
    assert made.lr > 0
    if not kinds:
        return  # torch.distributed.checkpoint wants an optimizer
    state = get_optimizer_state_dict(model, made.optimizers, options=FLAT)
    assert {name for name, _ in held} == {
        key.split(".", 1)[1].rpartition(".")[0] for key in state if key.startswith("state.")
    }


def test_state_exists_from_the_start_and_counts_from_zero() -> None:
    model = Tiny()
    state = get_optimizer_state_dict(model, build(model).optimizers, options=FLAT)
    assert state["state.embed.weight.step"].item() == 0.0
    assert not state["state.head.weight.exp_avg"].any()
    assert state["state.layers.0.up.weight.momentum_buffer"].shape == (10, 6)
    assert state["state.layers.0.up.weight.second_momentum_buffer"].shape == (10, 1)
    assert state["state.layers.0.down.weight.second_momentum_buffer"].shape == (1, 10)


def _through_memory(model: nn.Module, optimizers: Optimizers, target: nn.Module, into: Optimizers) -> None:
    target.load_state_dict(model.state_dict())
    state = get_optimizer_state_dict(model, optimizers.optimizers, options=FLAT)
    copy = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    set_optimizer_state_dict(target, into.optimizers, copy, options=FLAT)


def test_a_resumed_run_takes_the_same_steps() -> None:
    model, whole = Tiny(), Tiny()
    losses = train(whole, build(whole), range(8))
    half = build(model)
    first = train(model, half, range(4))
    again = Tiny()
    resumed = build(again)
    _through_memory(model, half, again, resumed)
    assert first + train(again, resumed, range(4, 8)) == losses


def test_a_checkpoint_does_not_bring_its_options_along() -> None:
    """A run extended, with another rate, kernel and beta, follows its own config."""
    model, longer = Tiny(), Tiny()
    old = build(model, implementation="for-loop")
    train(model, old, range(8))
    groups = [Group(match=MATRICES, kind="muon", lr=0.1), Group(match=".*", lr=0.2, beta1=0.5)]
    new = build(longer, steps=16, groups=groups)
    _through_memory(model, old, longer, new)
    new.set_schedule(8)
    fresh = build(Tiny(), steps=16, groups=groups)
    fresh.set_schedule(8)
    assert options(new) == options(fresh)
    assert options(new)[".*"]["lr"] == 0.2
    assert options(new)[".*"]["fused"] is True
    train(longer, new, range(8, 10))


def shard(model: nn.Module, world: int, hsdp: bool = False) -> nn.Module:
    shape, names = ((2, world // 2), ("replicate", "shard")) if hsdp else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp_losses(rank: int, hsdp: bool) -> list[float]:
    model = shard(Tiny(), 4, hsdp)
    return train(model, build(model), range(6))


@pytest.mark.parametrize("hsdp", [False, True])
def test_fsdp_trains_like_one_rank(hsdp: bool) -> None:
    """Uneven and empty shards and a one-element parameter, through fused AdamW and Muon."""
    model = Tiny()
    expected = train(model, build(model), range(6))
    for losses in fork_ranks(_fsdp_losses, 4, hsdp):
        assert losses == pytest.approx(expected, abs=2e-5)


def _tensor_parallel_losses(rank: int) -> list[float]:
    model = Tiny()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return train(model, build(model), range(6))


def test_tensor_parallel_shards_train_like_one_rank() -> None:
    """Parameters on two meshes in one AdamW group; in Muon's, rows cut twice, and rows and columns cut."""
    model = Tiny()
    expected = train(model, build(model), range(6))
    assert fork_ranks(_tensor_parallel_losses, 4)[0] == pytest.approx(expected, abs=2e-5)


def _save(rank: int, folder: str) -> list[float]:
    model = shard(Tiny(), 2)
    made = build(model)
    train(model, made, range(4))
    dcp.save({"model": get_model_state_dict(model), "optim": _state(model, made)}, checkpoint_id=folder)
    return train(model, made, range(4, 8))


def _load(rank: int, folder: str, world: int, wrap: bool) -> list[float]:
    model = shard(Tiny(), world) if wrap else Tiny()
    made = build(model)
    state = {"model": get_model_state_dict(model), "optim": _state(model, made)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, made.optimizers, state["optim"], options=FLAT)
    return train(model, made, range(4, 8))


def _state(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizers.optimizers, options=FLAT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("checkpoint") / "step_4"
    return folder, fork_ranks(_save, 2, str(folder))[0]


@pytest.mark.parametrize(("world", "wrap"), [(1, False), (1, True), (2, True), (4, True)])
def test_saved_on_two_ranks_loads_on_any(saved: tuple[Path, list[float]], world: int, wrap: bool) -> None:
    folder, expected = saved
    losses = fork_ranks(_load, world, str(folder), world, wrap)[0]
    assert losses == (expected if world == 2 else pytest.approx(expected, abs=1e-5))
