"""Each part of Muon's direction by itself, on matrices whose answer is known."""

from typing import Any

import pytest
import torch

from nanovl.config.schema import Muon
from nanovl.optim import orthogonalize as o

PLAIN: dict[str, Any] = {"row_equilibration": False, "renormalize": False, "variance_reduction": False}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 96, 96), (2, 160, 48), (2, 48, 160), (5, 8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "low", "high"), [("polar_express", 0.85, 1.15), ("newton_schulz", 0.67, 1.21)]
)
def test_singular_values_come_near_one_and_directions_stay(
    shape: tuple[int, ...], dtype: torch.dtype, kind: Any, low: float, high: float
) -> None:
    x = random(*shape)
    out = o.orthogonalize(x, Muon(orthogonalization=kind, **PLAIN), dtype)
    assert out.dtype == torch.float32
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    nearest = u @ v
    values = torch.linalg.svdvals(out)
    # five steps lift what is not nearly zero
    well = s / torch.linalg.vector_norm(s, dim=-1, keepdim=True) > 0.01
    assert values[well].min() > low
    assert values.max() < high
    cosine = (out * nearest).sum() / (out.norm() * nearest.norm())
    assert cosine > 0.97


def test_one_quintic_step_by_hand() -> None:
    # diag(3, 4) has norm 5, so singular values 0.6 and 0.8, then s -> a s + b s^3 + c s^5
    x = torch.diag(torch.tensor([3.0, 4.0]))[None]
    for kind, (a, b, c), margin in (
        ("newton_schulz", o.NEWTON_SCHULZ, 1.0),
        ("polar_express", o.POLAR_EXPRESS[0], 1.01),
    ):
        config = Muon(orthogonalization=kind, iterations=1, **PLAIN)
        values = [a * s + b * s**3 + c * s**5 for s in (0.6 / margin, 0.8 / margin)]
        out = o.orthogonalize(x, config, torch.float32)
        torch.testing.assert_close(out[0], torch.diag(torch.tensor(values)))


def test_more_steps_than_coefficients_are_refused() -> None:
    with pytest.raises(AssertionError):
        o.orthogonalize(random(1, 4, 4), Muon(iterations=6), torch.float32)


def test_batches_and_single_matrices_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(7, 12, 20)
    together = o.orthogonalize(x, Muon(), torch.float32)
    monkeypatch.setattr(o, "CPU_SINGLE_SIDE", 12)
    torch.testing.assert_close(together, o.orthogonalize(x, Muon(), torch.float32), rtol=0, atol=1e-5)
    assert o.orthogonalize(x[:0], Muon(), torch.float32).shape == (0, 12, 20)


def test_rows_get_equal_norms() -> None:
    # rows of norm 5 and 0: the root mean square is 5 / sqrt(2), a row of nothing stays nothing
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    torch.testing.assert_close(o.equilibrate_rows(x), x / 2**0.5)
    norms = torch.linalg.vector_norm(o.equilibrate_rows(random(2, 5, 9)), dim=-1)
    torch.testing.assert_close(norms, norms[:, :1].expand(2, 5))


def test_the_norm_is_that_of_an_orthogonal_matrix() -> None:
    torch.testing.assert_close(o.frobenius(o.renormalize(random(3, 4, 9))), torch.full((3, 1, 1), 2.0))


def test_variance_is_evened_out_by_rows_of_tall_matrices() -> None:
    # mean squares of the rows: 1 and 4; remembered from 0 with 1 - beta2 = 0.25: 0.25 and 1
    x = torch.tensor([[[1.0, -1.0], [2.0, 2.0]]])
    out, second = o.reduce_variance(x, torch.zeros(1, 2, 1), beta2=0.75)
    torch.testing.assert_close(second, torch.tensor([[[0.25], [1.0]]]))
    # divided by 0.5 and 1 every element is 2 in size; the norm sqrt(10) is kept, so all become sqrt(10) / 2
    torch.testing.assert_close(out, torch.tensor([[[1.0, -1.0], [1.0, 1.0]]]) * 10**0.5 / 2)


def test_variance_is_evened_out_by_columns_of_wide_matrices() -> None:
    x = torch.tensor([[[1.0, 2.0, 0.0], [-1.0, 2.0, 0.0]]])
    out, second = o.reduce_variance(x, torch.zeros(1, 1, 3), beta2=0.75)
    torch.testing.assert_close(second, torch.tensor([[[0.25, 1.0, 0.0]]]))
    torch.testing.assert_close(out, torch.tensor([[[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]]]) * 10**0.5 / 2)


def test_nothing_stays_nothing() -> None:
    out, second = o.direction(torch.zeros(2, 4, 3), torch.zeros(2, 4, 1), Muon(), 0.9, torch.bfloat16)
    assert second is not None
    assert not out.any()
    assert not second.any()
