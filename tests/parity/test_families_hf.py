"""Every family against transformers: logits, gradients, greedy tokens, packed documents, checkpoints both ways.

The families and their configs stand where `every_family` finds them; what only some of them have, in those files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from every_family import every_family
from hf_pairs import (
    assert_checkpoint_returns,
    assert_packed_equals_separate,
    assert_same_greedy_tokens,
    assert_same_logits_and_gradients,
    cases,
    pair,
)

FAMILIES = every_family()


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES, seeds=3))
def test_logits_and_all_gradients(name: str, case: str, seed: int) -> None:
    family = FAMILIES[name]
    of = pair(family, case, seed)
    assert of.spec.family.name == name
    assert_same_logits_and_gradients(of, seed, limit=family.limit, length=family.length)


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_greedy_tokens(name: str, case: str, seed: int) -> None:
    assert_same_greedy_tokens(pair(FAMILIES[name], case), seed, prompt=12)


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_packed_documents_equal_separate_ones(name: str, case: str, seed: int) -> None:
    family = FAMILIES[name]
    of = pair(family, case)
    assert_packed_equals_separate(of, seed, lengths=family.documents, limit=family.packed_limit)


@pytest.mark.parametrize(("name", "case", "seed"), cases(FAMILIES))
def test_checkpoint_returns_bit_equal_and_loads_in_transformers(
    tmp_path: Path, name: str, case: str, seed: int
) -> None:
    assert_checkpoint_returns(pair(FAMILIES[name], case), tmp_path, seed)
