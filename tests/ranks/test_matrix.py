"""The matrix of meshes: each the same as one rank."""

from __future__ import annotations

import pytest
from matrix import COVERING, MATRIX, Case
from meshes import assert_same


def case_of(model: str, mesh: str) -> Case:
    return next(case for case in MATRIX if (case.model, case.mesh) == (model, mesh))


@pytest.mark.parametrize(("model", "mesh"), COVERING)
def test_covering_meshes_are_as_one_rank(model: str, mesh: str) -> None:
    case = case_of(model, mesh)
    assert_same(case.job(), model, case.world)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_mesh_is_as_one_rank(case: Case) -> None:
    assert_same(case.job(), case.model, case.world)
