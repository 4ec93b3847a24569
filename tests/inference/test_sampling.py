from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from nanovl.inference.sampling import (
    candidates,
    choose,
    draw,
    keep_top_k,
    keep_top_p,
    logprobs_of,
    random_source,
    uniform,
)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits_BV: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits_BV]


def test_top_k_keeps_the_largest_and_ties() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [2.0, 2.0, 5.0, 1.0]])
    assert kept(keep_top_k(logits, 2)) == [[1, 3], [0, 1, 2]]
    assert kept(keep_top_k(logits, 9)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.1, [2]), (0.49, [2]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 1, 2]), (0.99, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(logits_of(0.3, 0.15, 0.5, 0.05), top_p)) == [expected]


def test_temperature_comes_before_top_p() -> None:
    # at temperature 0.5 probabilities are squared: .25 .09 .0225 .0025 over .365 = .685 .247 .062 .007
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept(candidates(logits, 1.0, top_p=0.75)) == [[0, 1]]
    assert kept(candidates(logits, 0.5, top_p=0.65)) == [[0]]
    torch.testing.assert_close(candidates(logits, 0.5).softmax(-1)[0, 0], torch.tensor(0.25 / 0.365))


def test_top_k_comes_before_top_p() -> None:
    # of the best two, .5 and .3, the first alone has .625
    assert kept(candidates(logits_of(0.5, 0.3, 0.2), 1.0, top_k=2, top_p=0.6)) == [[0]]
    assert kept(candidates(logits_of(0.5, 0.3, 0.2), 1.0, top_p=0.6)) == [[0, 1]]


@pytest.mark.parametrize("top_k", [1, 7, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_equal_to_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(16, 100, generator=torch.Generator().manual_seed(top_k)) * 3
    ids = torch.zeros(16, 1, dtype=torch.long)
    expected = TopPLogitsWarper(top_p)(ids, TopKLogitsWarper(top_k)(ids, logits / 0.7))
    actual = candidates(logits, 0.7, top_k, top_p)
    assert kept(actual) == kept(expected)
    torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1))


def test_small_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    assert candidates(logits, 1e-5).softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("u", "expected"), [(0.0, 1), (0.49, 1), (0.51, 3), (0.74, 3), (0.76, 4), (1 - 2**-53, 4)]
)
def test_draw_inverts_the_cumulative_distribution(u: float, expected: int) -> None:
    logits = logits_of(0.0, 0.5, 0.0, 0.25, 0.25, 0.0)
    assert draw(logits, torch.tensor([u], dtype=torch.float64)).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_an_excluded_token_is_never_drawn(seed: int, u: float) -> None:
    logits = candidates(torch.randn(1, 300, generator=torch.Generator().manual_seed(seed)) * 5, 1.0, top_k=20)
    assert logits[0, draw(logits, torch.tensor([u], dtype=torch.float64))].isfinite()


def test_draws_follow_the_probabilities() -> None:
    source, count = random_source(0, 0, [1]), 4000
    numbers = torch.tensor([uniform(source) for _ in range(count)], dtype=torch.float64)
    ids = draw(logits_of(0.6, 0.3, 0.1).expand(count, 3), numbers)
    share = ids.bincount(minlength=3) / count
    assert (share - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.025  # 3.2 standard deviations


def test_a_source_depends_on_seed_sample_and_prompt() -> None:
    first = uniform(random_source(1, 0, [5, 6]))
    assert uniform(random_source(1, 0, [5, 6])) == first
    for other in ((2, 0, [5, 6]), (1, 1, [5, 6]), (1, 0, [56])):
        assert uniform(random_source(*other)) != first


def test_choose_mixes_settings_and_gives_both_logprobs() -> None:
    logits = logits_of(0.5, 0.3, 0.2).expand(3, 3)
    sources = [random_source(0, i, [0]) for i in range(3)]
    rows = [(0.0, 0, 1.0), (1.0, 2, 1.0), (1e-5, 0, 1.0)]
    choice = choose(logits, rows, sources, agree=lambda ids: ids.copy_(torch.tensor([0, 1, 0])))
    assert choice.ids_B.tolist() == [0, 1, 0]
    torch.testing.assert_close(choice.logprobs_B, torch.tensor([0.5, 0.3, 0.5]).log())
    torch.testing.assert_close(choice.sampling_logprobs_B, torch.tensor([1.0, 0.375, 1.0]).log())


def test_choose_never_takes_what_is_excluded() -> None:
    logits = logits_of(0.5, 0.3, 0.2).expand(2, 3)
    excluded = torch.tensor([True, False, True])
    choice = choose(logits, [(0.0, 0, 1.0), (1.0, 0, 1.0)], [random_source(0, 0, [0])] * 2, excluded)
    assert choice.ids_B.tolist() == [1, 1]
    torch.testing.assert_close(choice.logprobs_B, torch.tensor([0.3, 0.3]).log())  # the model's own
    assert choice.sampling_logprobs_B.tolist() == [0.0, 0.0]


def test_logprobs_are_those_of_log_softmax() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 0, 49, 7])
    expected = logits.log_softmax(-1)[torch.arange(4), ids]
    assert (logprobs_of(logits, ids) - expected).abs().max() < 1e-6
    assert math.isnan(logprobs_of(torch.tensor([[0.0, math.nan]]), torch.tensor([0])).item())
