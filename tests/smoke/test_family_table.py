"""README's table of architectures has every family of the registry, as tools/write_families.py writes it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nanovl.registry import MODELS, family

ROOT = Path(__file__).parents[2]
LIMIT = 5e-5
"""Of a logit in float32; that of the families with gated DeltaNet, the others stay below 2e-5."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_families", ROOT / "tools" / "write_families.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def test_the_table_is_of_todays_registry(tool: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index(tool.FIRST) : text.index(tool.LAST)]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| `")
    ]
    assert [row[0].strip("`") for row in rows] == [*MODELS], "run python tools/write_families.py"
    for row in rows:
        one = family(row[0].strip("`"))
        assert row[:4] == tool.said(one), "run python tools/write_families.py"
        assert row[6] == tool.checkpoints(one)
        if one.hf is None or one.hf.config_to_hf is None:
            assert row[4:6] == ["", ""]
        else:
            assert float(row[4]) <= LIMIT
            assert row[5] == "equal"
    assert re.search(r"over \d+ random small models", table)
