"""Schedules at their corners, by hand."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovl.config.schema import LrSchedule, Muon
from nanovl.optim.schedule import lr_factor, muon_momentum, weight_decay_factor


def schedule(kind: Any = "wsd", warmup: int = 10, decay: float = 0.5, floor: float = 0.1) -> LrSchedule:
    return LrSchedule(kind=kind, warmup_steps=warmup, decay_ratio=decay, min_lr_factor=floor)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warmup_is_linear_and_starts_above_zero(kind: Any) -> None:
    assert lr_factor(0, 100, schedule(kind)) == pytest.approx(0.1)
    assert lr_factor(4, 100, schedule(kind)) == pytest.approx(0.5)
    assert lr_factor(9, 100, schedule(kind)) == pytest.approx(1.0)
    assert lr_factor(10, 100, schedule(kind)) == pytest.approx(1.0)
    assert lr_factor(0, 100, schedule(kind, warmup=0)) == pytest.approx(1.0)


def test_constant_never_falls() -> None:
    assert [lr_factor(step, 100, schedule("constant")) for step in (50, 99, 100, 1000)] == [1.0] * 4


def test_linear_falls_from_the_end_of_warmup() -> None:
    # 10 warm-up steps, then 90 of fall: at step 55 half way from 1 to 0.1
    assert lr_factor(55, 100, schedule("linear")) == pytest.approx(0.55)
    assert lr_factor(99, 100, schedule("linear")) == pytest.approx(0.1 + 0.9 / 90)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert lr_factor(55, 100, schedule("cosine")) == pytest.approx(0.55)
    # a third of the way: (1 + cos 60 degrees) / 2 = 0.75
    assert lr_factor(40, 100, schedule("cosine")) == pytest.approx(0.1 + 0.9 * 0.75)


def test_wsd_stays_and_then_falls_over_the_last_part() -> None:
    assert lr_factor(50, 100, schedule()) == pytest.approx(1.0)
    assert lr_factor(75, 100, schedule()) == pytest.approx(0.55)
    assert lr_factor(99, 100, schedule()) == pytest.approx(0.1 + 0.9 / 50)
    assert lr_factor(99, 100, schedule(decay=0.0)) == pytest.approx(1.0)
    # nanochat's own numbers: 40 steps up, the last 65 percent of 2520 (1638) down to 0.05
    assert lr_factor(882, 2520, LrSchedule()) == 1.0
    assert lr_factor(1701, 2520, LrSchedule()) == pytest.approx(0.525)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_at_and_past_the_end_the_floor_holds(kind: Any) -> None:
    assert [lr_factor(step, 100, schedule(kind)) for step in (100, 101, 10_000)] == pytest.approx([0.1] * 3)
    assert lr_factor(0, 0, schedule(kind)) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_warmup_longer_than_the_run(kind: Any) -> None:
    values = [lr_factor(step, 5, schedule(kind, warmup=100, floor=0.0)) for step in range(7)]
    assert values[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert values[5:] == [0.0, 0.0]


@given(
    step=st.integers(0, 5000),
    steps=st.integers(0, 3000),
    kind=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    warmup=st.integers(0, 4000),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_always_between_zero_and_one(
    step: int, steps: int, kind: str, warmup: int, decay: float, floor: float
) -> None:
    assert 0.0 <= lr_factor(step, steps, schedule(kind, warmup, decay, floor)) <= 1.0
    assert 0.85 <= muon_momentum(step, steps, Muon(), schedule(kind, warmup, decay, floor)) <= 0.97 + 1e-12


def test_momentum_rises_and_falls_with_the_warmdown() -> None:
    muon = Muon(momentum_start=0.8, momentum=0.96, momentum_warmup_steps=100, momentum_end=0.9)
    values = [muon_momentum(step, 1000, muon, schedule()) for step in (0, 50, 100, 500, 750, 1000, 2000)]
    assert values == pytest.approx([0.80, 0.88, 0.96, 0.96, 0.93, 0.90, 0.90])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_momentum_stays_where_no_warmdown_is_apart(kind: Any) -> None:
    muon = Muon(momentum_start=0.8, momentum=0.96, momentum_warmup_steps=100, momentum_end=0.9)
    assert muon_momentum(1000, 1000, muon, schedule(kind)) == pytest.approx(0.96)


def test_momentum_does_not_jump_in_a_short_run() -> None:
    muon = Muon(momentum_start=0.8, momentum=0.96, momentum_warmup_steps=100, momentum_end=0.9)
    values = [muon_momentum(step, 80, muon, schedule()) for step in range(81)]
    assert values[40] == pytest.approx(0.864)
    assert values[80] == pytest.approx(0.9)
    assert max(abs(a - b) for a, b in pairwise(values)) < 0.004
    assert muon_momentum(0, 80, Muon(momentum_warmup_steps=0), schedule()) == 0.97


def test_weight_decay_factor() -> None:
    assert [weight_decay_factor("constant", step, 100) for step in (0, 50, 100, 200)] == [1.0] * 4
    assert [weight_decay_factor("linear", step, 100) for step in (0, 50, 100, 200)] == [1.0, 0.5, 0.0, 0.0]
    cosine = [weight_decay_factor("cosine", step, 300) for step in (0, 100, 150, 300, 900)]
    assert cosine == pytest.approx([1.0, 0.75, 0.5, 0.0, 0.0])
    assert weight_decay_factor("linear", 0, 0) == 0.0
