"""All pairs of tests/parity by family."""

from __future__ import annotations

from importlib import import_module

from hf_pairs import HfFamily

FILES = ("dense_families", "test_moe_families_hf", "test_gpt_oss_hf", "test_gdn_families_hf")
"""Those with a dict FAMILIES."""


def every_family() -> dict[str, HfFamily]:
    """Name in the registry -> transformers class and tiny configs."""
    return {name: found for file in FILES for name, found in import_module(file).FAMILIES.items()}
