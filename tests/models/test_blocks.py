from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nanovl.models.blocks.attention import visible
from nanovl.models.blocks.head import Head
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.models.blocks.rope import RopeConfig, apply_rope, rope_tables


def test_a_window_counts_the_token_itself() -> None:
    mask = visible(5, 2, None, torch.device("cpu"))
    assert mask is not None
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_a_query_sees_only_its_own_document() -> None:
    mask = visible(4, None, torch.tensor([[0, 0, 1, 1]]), torch.device("cpu"))
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_plain_causal_needs_no_mask() -> None:
    assert visible(4, None, None, torch.device("cpu")) is None
    assert visible(4, 4, None, torch.device("cpu")) is None
    assert visible(4, 3, None, torch.device("cpu")) is not None


def test_rope_turns_by_position_times_frequency() -> None:
    cos, sin = rope_tables(RopeConfig(theta=100.0), 4, torch.tensor([[0, 3]]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 1, 4)
    out = apply_rope(x, cos, sin)
    assert torch.equal(out[0, 0, 0], x[0, 0, 0])
    angles = [3.0, 3.0 / 10.0]  # theta^(-2i/4) = 1 and 1/10
    expected = [math.cos(a) * p - math.sin(a) * q for a, p, q in zip(angles, (1, 2), (3, 4), strict=True)]
    expected += [math.cos(a) * q + math.sin(a) * p for a, p, q in zip(angles, (1, 2), (3, 4), strict=True)]
    torch.testing.assert_close(out[0, 1, 0], torch.tensor(expected))


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, NormConfig(eps=0.5))
    norm.weight.data = torch.tensor([1.0, 10.0])  # type: ignore[union-attr]
    # mean square of (3, 4) is 12.5; 12.5 + 0.5 = 13
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 40.0]) / math.sqrt(13))
    assert list(RMSNorm(2, NormConfig(weight="none")).parameters()) == []


def reference_loss(head: Head, x: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    nll = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    return (nll * weights.flatten()).sum()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [3, 100])
def test_chunked_cross_entropy_equals_torch(softcap: float | None, chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    head = Head(16, 37, padded_vocab_size=64, softcap=softcap)
    head.weight.data.normal_(generator=g)
    x = torch.randn(2, 5, 16, generator=g, requires_grad=True)
    targets = torch.randint(0, 37, (2, 5), generator=g)
    targets[0, 2] = targets[1, 4] = -100
    weights = torch.rand(2, 5, generator=g)
    expected = reference_loss(head, x, targets, weights)
    expected_grads = torch.autograd.grad(3.0 * expected, (x, head.weight))
    loss, nll = head.cross_entropy(x, targets, weights, chunk)
    grads = torch.autograd.grad(3.0 * loss, (x, head.weight))
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    assert nll[0, 2] == 0
    assert grads[1][37:].abs().max() == 0
    torch.testing.assert_close((nll * weights).sum(), expected)


def test_chunked_cross_entropy_in_bfloat16_stays_near_float32() -> None:
    g = torch.Generator().manual_seed(1)
    head = Head(32, 50)
    head.weight.data.normal_(std=0.3, generator=g)
    x = torch.randn(1, 64, 32, generator=g)
    targets = torch.randint(0, 50, (1, 64), generator=g)
    weights = torch.full((1, 64), 1 / 64)
    expected = torch.autograd.grad(reference_loss(head, x, targets, weights), head.weight)[0]
    half = Head(32, 50)
    half.weight.data = head.weight.data.bfloat16()
    loss, _ = half.cross_entropy(x.bfloat16(), targets, weights, 16)
    actual = torch.autograd.grad(loss, half.weight)[0]
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() / expected.norm() < 0.02


def test_without_gradients_the_loss_keeps_nothing() -> None:
    head = Head(4, 7)
    head.weight.data.normal_()
    with torch.no_grad():
        loss, nll = head.cross_entropy(torch.randn(1, 3, 4), torch.tensor([[1, 2, 3]]), torch.ones(1, 3), 2)
    assert not loss.requires_grad
    assert nll.shape == (1, 3)
