"""Every released size has as many parameters as transformers gives it."""

from __future__ import annotations

import pytest
import torch
import transformers

from nanovl.registry import MODELS, family

SIZES = [
    (name, flavor)
    for name in MODELS
    if family(name).hf is not None
    for flavor in family(name).flavors
    if flavor != "debug"
]


WITHOUT_A_CLASS = {"nanochat", "grok2"}
"""Their sizes are those of the code that made them: tests/models/test_nanochat.py, and grok2's own tests."""


def test_no_family_is_forgotten() -> None:
    assert {name for name in MODELS if family(name).hf is None} <= WITHOUT_A_CLASS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flavor"), SIZES)
def test_parameters_equal_transformers(name: str, flavor: str) -> None:
    found = family(name)
    config = found.flavors[flavor]()
    assert found.hf is not None
    said = found.hf.config_to_hf(config)
    architecture = getattr(transformers, said.pop("architectures")[0])
    with torch.device("meta"):
        ours = found.model(config)
        theirs = architecture(transformers.AutoConfig.for_model(**said))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
