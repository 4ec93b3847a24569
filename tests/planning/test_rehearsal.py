"""What is booked for two layers of a kind against all layers run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanovl.config.schema import Model
from nanovl.parallelisms.init import materialize
from nanovl.planning import rehearsal
from nanovl.planning.ledger import Account, Ledger
from nanovl.planning.rehearsal import Rehearsed, rehearse
from nanovl.registry import resolve_model

NANOCHAT = {
    "depth": 12,
    "aspect_ratio": 8,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "short_window_multiple": 8,
}


def rehearsed(name: str, flavor: str, overrides: dict[str, Any]) -> Rehearsed:
    spec = resolve_model(Model(name=name, flavor=flavor, overrides=overrides), 512)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(model, torch.device("cpu"))
        tokens_BT = torch.zeros(2, 64, dtype=torch.int64)
        return rehearse(
            model, lambda: ((), model(tokens_BT, objective=lambda head, x_BTD: head(x_BTD).sum()))
        )


@pytest.mark.parametrize(
    ("name", "flavor", "overrides"),
    [("qwen3", "debug", {}), ("nanochat", "", NANOCHAT), ("olmo3", "debug", {})],
)
def test_two_of_a_kind_stand_for_all(
    name: str, flavor: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = rehearsed(name, flavor, overrides)
    monkeypatch.setattr(rehearsal, "RUNS_OF_A_KIND", 100)
    assert asdict(rehearsed(name, flavor, overrides)) == asdict(short)


def test_flops_are_those_of_the_formula() -> None:
    """All products with weights of the layers; backward is twice forward."""
    found = rehearsed("qwen3", "debug", {})
    layer = 64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 128
    assert found.forward_flops == 2 * 64 * 2 * 8 * layer
    assert found.recomputed_flops == 0


@pytest.mark.parametrize("fake", [False, True])
def test_ledger_counts_what_is_alive(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.no_grad(), Ledger() as ledger:
        a = torch.zeros(100, 10)  # 4000 bytes
        b = a.T @ a  # 400
        assert (ledger.live, ledger.account.flops) == (4400, 2 * 10 * 100 * 10)
        view = a[:50]
        del a
        assert ledger.live == 4400  # the view keeps it
        before = ledger.account
        del view, b
        inner = ledger.open(Account())
        assert (ledger.live, before.peak, before.after, inner.before) == (0, 4400, 0, 0)
