"""All pairs of tests/parity by family: those of the dicts that test files call FAMILIES, and NanoChat's."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from hf_pairs import HfFamily, rope

NANOCHAT = HfFamily(
    "NanoChat",
    {"first": {"rope_parameters": rope(1e4)}},
    {"num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 256, "tie_word_embeddings": False},
)


def every_family() -> dict[str, HfFamily]:
    """Name in the registry -> transformers class and tiny configs."""
    found = {"nanochat_v1": NANOCHAT}
    for file in sorted(Path(__file__).parent.glob("test_*_hf.py")):
        named = getattr(import_module(file.stem), "FAMILIES", {})
        found |= named if isinstance(named, dict) else {}
    return found
