"""Muon against the formulas in float64, against torch's own, and sharded against whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from nanovl.config import schema
from nanovl.dist import fork_ranks
from nanovl.optim import muon as muon_module
from nanovl.optim.muon import Muon
from nanovl.optim.orthogonalize import NEWTON_SCHULZ, POLAR_EXPRESS, direction

SWITCHES = ("row_equilibration", "renormalize", "variance_reduction", "cautious_weight_decay")
OFF: dict[str, Any] = dict.fromkeys(SWITCHES, False)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Reference:
    """One matrix, step by step as the papers have it, in float64."""

    def __init__(self, p: Tensor, config: schema.Muon) -> None:
        self.p, self.config = p.clone(), config
        self.b = torch.zeros_like(p)
        self.v = torch.zeros(max(p.shape) if p.shape[0] >= p.shape[1] else p.shape[1], dtype=p.dtype)

    def step(self, g: Tensor, lr: float, mu: float, wd: float, beta2: float) -> None:
        rows, cols = self.p.shape
        self.b = mu * self.b + (1 - mu) * g
        x = (1 - mu) * g + mu * self.b
        if self.config.row_equilibration:
            norms = (x**2).sum(1).sqrt()
            x = torch.diag((norms**2).mean().sqrt() / norms) @ x
        size = (x**2).sum().sqrt()
        polar, n = self.config.orthogonalization == "polar_express", self.config.iterations
        x = x / (1.01 * size + 1e-6 if polar else size + 1e-7)
        for a, b, c in POLAR_EXPRESS[:n] if polar else [NEWTON_SCHULZ] * n:
            x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
        if self.config.renormalize:
            x = x * min(rows, cols) ** 0.5 / (x**2).sum().sqrt()
        if self.config.variance_reduction:
            by_row = rows >= cols
            self.v = beta2 * self.v + (1 - beta2) * (x**2).mean(1 if by_row else 0)
            even = x / self.v.sqrt()[:, None] if by_row else x / self.v.sqrt()
            x = even * (x**2).sum().sqrt() / (even**2).sum().sqrt()
        lr *= max(1, rows / cols) ** 0.5
        mask = (x * self.p >= 0).double() if self.config.cautious_weight_decay else 1.0
        self.p = self.p - lr * x - lr * wd * self.p * mask


CONFIGS = {
    "all": schema.Muon(),
    "none": schema.Muon(**OFF),
    "quintic": schema.Muon(orthogonalization="newton_schulz", iterations=3),
    **{f"no {switch}": schema.Muon(**{switch: False}) for switch in SWITCHES},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (1, 5), (3, 7, 5), (2, 3, 4, 6)])
def test_every_switch_follows_the_formulas(name: str, shape: tuple[int, ...]) -> None:
    config = CONFIGS[name]
    p = nn.Parameter(draw(0, *shape))
    references = [Reference(matrix, config) for matrix in p.detach().reshape(-1, *shape[-2:])]
    optimizer = Muon([p], config, lr=0.1, weight_decay=0.3, beta2=0.8, compute_dtype=torch.float64)
    for step, mu in enumerate((0.85, 0.9, 0.95)):
        p.grad = draw(step + 1, *shape)
        optimizer.param_groups[0]["momentum"] = mu
        optimizer.step()
        for reference, g in zip(references, p.grad.reshape(-1, *shape[-2:]), strict=True):
            reference.step(g, 0.1, mu, 0.3, 0.8)
    expected = torch.stack([reference.p for reference in references]).view(shape)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-9)


def test_float32_and_bfloat16_compute_stay_close_to_float64() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        p = nn.Parameter(draw(0, 24, 16).float())
        reference = Reference(p.detach().double(), schema.Muon())
        optimizer = Muon([p], schema.Muon(), lr=0.1, compute_dtype=dtype)
        for step in range(3):
            p.grad = draw(step + 1, 24, 16).float()
            optimizer.step()
            reference.step(p.grad.double(), 0.1, 0.97, 0.0, 0.9)
        moved = (reference.p - draw(0, 24, 16)).norm()
        error = ((p.detach() - reference.p).norm() / moved).item()
        assert error < tolerance
        assert p.dtype == optimizer.state[p]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(32, 48), (20, 20), (48, 12)])
def test_torchs_muon_is_ours_all_off(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # torch always casts to bfloat16; without that both can be compared closely
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    wd = 0.1 if shape[0] <= shape[1] else 0.0  # torch decays by lr, nanochat by lr * sqrt(rows / cols)
    ours, theirs = (nn.Parameter(draw(0, *shape).float()) for _ in range(2))
    config = schema.Muon(orthogonalization="newton_schulz", momentum=0.95, **OFF)
    optimizer = Muon([ours], config, lr=0.02, weight_decay=wd)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=wd, momentum=0.95, nesterov=True, ns_steps=5)
    for step in range(4):
        ours.grad = draw(step + 1, *shape).float()
        theirs.grad = ours.grad.clone()
        optimizer.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_cautious_decay_touches_only_weights_that_the_update_shrinks() -> None:
    p = nn.Parameter(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    p.grad = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    config = schema.Muon(iterations=1, momentum=0.0, **{**OFF, "cautious_weight_decay": True})
    optimizer = Muon([p], config, lr=0.5, weight_decay=0.1)
    optimizer.step()
    x = sum(c * (0.5**0.5 / 1.01) ** k for c, k in zip(POLAR_EXPRESS[0], (1, 3, 5), strict=True))
    # update diag(x, -x) shrinks p00 and grows p11; decay acts on all but p11, also where update * weight = 0
    expected = torch.tensor([[1.0 - 0.5 * x - 0.05, -0.95], [0.95, 1.0 + 0.5 * x]])
    torch.testing.assert_close(p.detach(), expected)


def test_without_gradient_nothing_moves() -> None:
    a, b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([a, b], schema.Muon(), lr=0.1, weight_decay=0.1)
    a.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(b, torch.ones(3, 3))
    assert not torch.equal(a, torch.ones(3, 3))


def test_long_stacks_are_cut_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        ps = [nn.Parameter(draw(i, 4, 6)) for i in range(5)]
        for i, p in enumerate(ps):
            p.grad = draw(10 + i, 4, 6)
        Muon(ps, schema.Muon(), compute_dtype=torch.float64).step()
        return [p.detach() for p in ps]

    whole = run()
    monkeypatch.setattr(muon_module, "STACK_ELEMENTS", 48)
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-12)


STRIDED = _StridedShard(0, split_factor=2)
CUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "fsdp": ((4,), (Shard(0),)),
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "column parallel": ((2, 2), (STRIDED, Shard(0))),
    "row parallel": ((2, 2), (Shard(0), Shard(1))),
    "not in tp": ((2, 2), (Shard(0), Replicate())),
    "experts": ((2, 2), (STRIDED, Shard(0))),
    "experts, fsdp of rows": ((2, 2), (Shard(1), Shard(0))),
    "experts, tp of columns": ((1, 2, 2), (STRIDED, Shard(0), Shard(2))),
}
MATRICES = [(8, 6), (8, 6), (8, 6), (6, 8), (10, 4), (3, 5), (1, 7), (7, 2), (7, 2)]
EXPERTS = [(5, 4, 6), (2, 9, 5), (4, 6, 4)]


def cut(tensor: Tensor, name: str) -> DTensor:
    sizes, placements = CUTS[name]
    mesh = init_device_mesh("cpu", sizes)
    return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)


def _sharded_steps(rank: int, name: str) -> None:
    """Three steps on shards equal three steps on whole matrices, state included."""
    shapes = EXPERTS if name.startswith("experts") else MATRICES + EXPERTS[:1]
    whole = [nn.Parameter(draw(i, *shape)) for i, shape in enumerate(shapes)]
    parts = [nn.Parameter(cut(p.detach(), name)) for p in whole]
    ours = Muon(whole, schema.Muon(), lr=0.1, weight_decay=0.2, compute_dtype=torch.float64)
    sharded = Muon(parts, schema.Muon(), lr=0.1, weight_decay=0.2, compute_dtype=torch.float64)
    for step in range(3):
        for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
            p.grad = draw(100 * step + i + 50, *p.shape)
            q.grad = cut(p.grad, name)
        ours.step()
        sharded.step()
    for p, q in zip(whole, parts, strict=True):
        what = f"{name} {tuple(p.shape)}"
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=0, atol=1e-9, msg=what)
        for key, value in sharded.state[q].items():
            assert isinstance(value, DTensor)
            assert value.shape == ours.state[p][key].shape
            torch.testing.assert_close(value.full_tensor(), ours.state[p][key], rtol=0, atol=1e-9)
        assert sharded.state[q]["momentum_buffer"].placements == q.placements


@pytest.mark.parametrize("name", CUTS)
def test_sharded_steps_equal_whole_ones(name: str) -> None:
    fork_ranks(_sharded_steps, 4, name)


def _orthogonalized(rank: int) -> dict[str, int]:
    """Matrices this rank works on in a step, by the way they are cut."""
    found = {}
    for name in CUTS:
        shape = (5, 4, 6) if name.startswith("experts") else (8, 6)
        parts = [nn.Parameter(cut(draw(i, *shape), name)) for i in range(3)]
        for part in parts:
            part.grad = cut(draw(9, *shape), name)
        seen: list[int] = []

        def counted(u: Tensor, *args: Any, seen: list[int] = seen) -> Any:
            seen.append(len(u))
            return direction(u, *args)

        muon_module.direction = counted  # type: ignore[attr-defined]  # this process ends with the test
        Muon(parts, schema.Muon(), lr=0.1).step()
        found[name] = sum(seen)
    return found


def test_no_matrix_is_orthogonalized_twice() -> None:
    ranks = fork_ranks(_orthogonalized, 4)
    for name in CUTS:
        assert sum(rank[name] for rank in ranks) == (15 if name.startswith("experts") else 3), name
