"""Every option is documented, has a reader, and stands in a valid JSON Schema; every shipped job is a valid job."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from pathlib import Path

import jsonschema
import pytest

from nanovl.config import schema
from nanovl.config.load import json_schema
from nanovl.registry import read_job

ROOT = Path(schema.__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.toml"))


def sections() -> list[type]:
    return [c for c in vars(schema).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]


def test_every_field_has_a_docstring_right_below_it() -> None:
    tree = ast.parse(Path(schema.__file__).read_text())
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name == "Job":
            continue
        body = [n for n in node.body if not (isinstance(n, ast.Expr) and n is node.body[0])]
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.value or field).startswith(
                "field(default_factory=Muon"
            ):
                assert isinstance(after, ast.Expr), (
                    f"{node.name}.{ast.unparse(field.target)} has no docstring"
                )


def test_every_field_has_a_reader() -> None:
    rooms = [
        *ROOT.glob("nanovl/**/*.py"),
        *ROOT.glob("models/**/*.py"),
        *ROOT.glob("parallelisms/**/*.py"),
    ]
    code = "\n".join(
        p.read_text() for p in rooms if "config/schema.py" not in str(p) and "config/check.py" not in str(p)
    )
    for section in sections():
        if section is schema.Job:
            continue
        for field in dataclasses.fields(section):
            assert re.search(rf"\.{field.name}\b", code), (
                f"{section.__name__}.{field.name} is read by nothing"
            )


def test_field_types_are_closed() -> None:
    """Choices are Literals and sections are dataclasses: no field but the family's overrides takes anything."""
    for section in sections():
        for name, hint in typing.get_type_hints(section).items():
            assert "Any" not in str(hint) or name == "overrides", f"{section.__name__}.{name}: {hint}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_job_loads_and_fits_the_schema(path: Path) -> None:
    import tomllib

    job = read_job([path])
    assert job.job.run_dir.startswith("runs/")
    jsonschema.validate(tomllib.loads(path.read_text()), json_schema())


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_overlay_fits_every_job(path: Path, overlay: Path) -> None:
    read_job([path, overlay], world_size=2 if overlay.stem == "hsdp" else 1)


def test_the_schema_refuses_what_the_loader_refuses() -> None:
    for wrong in ({"training": {"steps": "ten"}}, {"trainig": {}}, {"training": {"stepz": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, json_schema())
    jsonschema.validate({"model": {"name": "nanochat", "depth": 4}}, json_schema())
