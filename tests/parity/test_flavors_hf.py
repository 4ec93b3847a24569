"""Every released size has as many parameters as transformers gives it."""

from __future__ import annotations

import pytest
import torch
import transformers

from nanovl.registry import MODELS, family

WITHOUT_A_CLASS = {"nanochat", "grok2"}
"""Their sizes are those of the code that made them: tests/models/test_nanochat.py, and grok2's own tests."""
SIZES = [
    (name, flavor)
    for name in MODELS
    if name not in WITHOUT_A_CLASS
    for flavor in family(name).flavors
    if flavor != "debug"
]


def test_no_family_is_forgotten() -> None:
    files = {name: family(name).hf for name in MODELS}
    assert {name for name, hf in files.items() if hf is None or hf.config_to_hf is None} == WITHOUT_A_CLASS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flavor"), SIZES)
def test_parameters_equal_transformers(name: str, flavor: str) -> None:
    found = family(name)
    config = found.flavors[flavor]()
    assert found.hf is not None
    assert found.hf.config_to_hf is not None
    said = found.hf.config_to_hf(config)
    architecture = getattr(transformers, said.pop("architectures")[0])
    with torch.device("meta"):
        ours = found.model(config)
        theirs = architecture(transformers.AutoConfig.for_model(**said))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
