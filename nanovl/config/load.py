"""TOML files and flags -> one checked Job, or every mistake at once.

Files merge left to right, flags (`--section.key=value`) come last; one pydantic checker sees the result, so a file
and a flag obey the same rules: strict types, no unknown key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanovl.config.check import check_job
from nanovl.config.schema import Job, Model
from nanovl.config.types import adapter, check_types, type_at
from nanovl.errors import ConfigError

Check = Callable[[Job], list[str]]
"""A rule over a whole job: returns its mistakes, each `dotted.key = value: what is wanted`."""


def load_job(
    files: Sequence[str | Path],
    flags: Sequence[str] = (),
    *,
    world_size: int = 1,
    checks: Sequence[Check] = (),
) -> Job:
    """The job that `files` and `flags` describe. Raises ConfigError with all mistakes."""
    origins: dict[str, str] = {}
    data: dict[str, Any] = {}
    for file in files:
        _merge(data, _read_toml(Path(file)), origins, Path(file).name)
    mistakes = _apply_flags(data, flags, origins)
    source = " + ".join([str(f) for f in files] + (["flags"] if flags else [])) or "the defaults"
    checked = check_types(Job, _fold_model(data), origins)
    mistakes += checked.mistakes
    if checked.built is not None:
        for check in (lambda job: check_job(job, world_size), *checks):
            mistakes += checked.unaffected(check(checked.built))
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)), source)
    job: Job = checked.built
    return job


def load_model(flags: Sequence[str]) -> Model:
    """The `[model]` of flags alone, with no job around it. Raises ConfigError with all mistakes."""
    origins: dict[str, str] = {}
    data: dict[str, Any] = {}
    mistakes = _apply_flags(data, flags, origins)
    mistakes += [f"{key}: belongs to a job; name one with --config FILE" for key in data if key != "model"]
    checked = check_types(Job, _fold_model(data), origins)
    if mistakes or checked.mistakes:
        raise ConfigError(mistakes + checked.mistakes, "flags")
    model: Model = checked.built.model
    return model


def job_from_dict(data: dict[str, Any], source: str = "config.json") -> Job:
    """The job of a resolved `config.json`."""
    checked = check_types(Job, _fold_model(data), {})
    if checked.mistakes:
        raise ConfigError(checked.mistakes, source)
    job: Job = checked.built
    return job


def job_to_dict(job: Job) -> dict[str, Any]:
    """Plain nested values, in the shape of the TOML (the model's own keys stand in `model`)."""
    data = dataclasses.asdict(job)
    data["model"].update(data["model"].pop("overrides"))
    return data


def json_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors; `[model]` is open, since each family adds its own keys."""
    schema = adapter(Job).json_schema()
    model = schema["$defs"]["Model"]
    del model["properties"]["overrides"]
    model["additionalProperties"] = True
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "nanovl job"}


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Field -> its docstring, from the schema's source."""
    properties = adapter(kind).json_schema()["properties"]
    return {name: text.get("description", "") for name, text in properties.items()}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return (
            json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        )  # a run's resolved config.json
    except FileNotFoundError:
        jobs = {p.stem: p for p in path.parent.glob("*.toml") if _is_job(p)}
        near = difflib.get_close_matches(path.stem, jobs, 1)
        hint = f"; did you mean {jobs[near[0]]}?" if near else ""
        raise ConfigError(f"--config {path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid {path.suffix.lstrip('.').upper() or 'TOML'}: {error}") from None


def _is_job(file: Path) -> bool:
    """Whether all tables of a TOML file are sections of a job."""
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found) and found.keys() <= {f.name for f in dataclasses.fields(Job)}


def _merge(
    into: dict[str, Any], new: dict[str, Any], origins: dict[str, str], origin: str, prefix: str = ""
) -> None:
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origins, origin, f"{dotted}.")
            continue
        into[key] = value
        _note_origin(dotted, value, origins, origin)


def _note_origin(dotted: str, value: Any, origins: dict[str, str], origin: str) -> None:
    origins[dotted] = origin
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _note_origin(f"{dotted}.{key}", item, origins, origin)


def _apply_flags(data: dict[str, Any], flags: Sequence[str], origins: dict[str, str]) -> list[str]:
    mistakes = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or "." not in flag:
            mistakes.append(f"{flag}: not a setting; settings are written --section.key=value")
            continue
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and not re.fullmatch(r"-[\d.].*", rest[0])):
                mistakes.append(f"--{key}: needs a value, as in --{key}=...")
                continue
            text = rest.pop(0)
        path = key.replace("-", "_").split(".")
        problem = _put(data, path, _literal(text, path))
        if problem:
            mistakes.append(f"--{key}: {problem}")
        origins[".".join(path)] = "flag"
    return mistakes


def _put(data: dict[str, Any], path: list[str], value: Any) -> str:
    """Set `value` at `path`; a list is indexed by number, and one past its end appends. Returns the problem, if any."""
    here: Any = data
    for part, following in zip(path, [*path[1:], None], strict=True):
        new: Any = value if following is None else [] if following.isdigit() else {}
        if isinstance(here, list):
            if not part.isdigit() or int(part) > len(here):
                return f"{part!r} is no index of a list of {len(here)}"
            if int(part) == len(here):
                here.append(new)
            elif following is None:
                here[int(part)] = value
            here = here[int(part)]
        elif isinstance(here, dict):
            if following is None:
                here[part] = value
            here = here.setdefault(part, new)
        else:
            return f"{part!r} is below a value, not a section"
    return ""


def _literal(text: str, path: list[str]) -> Any:
    """A flag's text as the schema's type: text stays text where a string is wanted, else it is read as a TOML value."""
    kind: Any = Job
    for part in path:
        kind = type_at(kind, part)
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False, "none": None, "None": None}.get(text, text)


def _fold_model(data: dict[str, Any]) -> dict[str, Any]:
    """Move the family's keys of `[model]` into `overrides`; the registry checks them against the family's config."""
    model = data.get("model")
    if not isinstance(model, dict):
        return data
    own = {f.name for f in dataclasses.fields(Model)} - {"overrides"}
    folded = {k: v for k, v in model.items() if k in own}
    return {**data, "model": {**folded, "overrides": {k: v for k, v in model.items() if k not in own}}}
