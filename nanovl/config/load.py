"""TOML files and flags -> one checked Job, or every mistake at once.

Files merge left to right, flags (`--section.key=value`) come last; one pydantic checker sees the result, so a file
and a flag obey the same rules: strict types, no unknown key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nanovl.config.check import check_job
from nanovl.config.schema import Job, Model
from nanovl.errors import ConfigError

Check = Callable[[Job], list[str]]
"""A rule over a whole job: returns its mistakes, each `dotted.key = value: what is wanted`."""
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
"""What pydantic calls keys that nobody knows, and keys that have to be there."""


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


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check_types` found."""

    built: Any
    """Of what is right alone, with defaults for the rest; None where too little is."""
    mistakes: list[str]
    """One line each."""
    at_fault: set[str]
    """Names of the keys that are wrong, and of those that were meant."""

    def unaffected(self, lines: Sequence[str]) -> list[str]:
        """Mistakes of `built` that name no key at fault: these are mistakes of what was given, too."""
        return [line for line in lines if not self.at_fault & set(re.findall(r"\w+", line))]


def check_types(kind: type[Any], data: dict[str, Any], origins: dict[str, str], prefix: str = "") -> Checked:
    """`kind` built from `data`; `prefix` stands before every dotted key."""
    built, errors = _build(kind, data)
    lines: list[str] = []
    at_fault: set[str] = set()
    for item in errors:
        path = _path(item)
        dotted = prefix + ".".join(map(str, path))
        came_from = f" (from {origins[dotted]})" if dotted in origins else ""
        near: list[str] = []
        if item["type"] in UNKNOWN:
            known = field_names(kind, item["loc"][:-1])
            near = difflib.get_close_matches(str(path[-1]), known, 1)
            lines.append(f"{dotted}: no such key{came_from}{_hint(near, known)}")
        elif item["type"] in MISSING:
            lines.append(f"{dotted}: missing; give it a value")
        else:
            lines.append(f"{dotted} = {item['input']!r}{came_from}: {_wanted(item)}")
        at_fault |= {str(path[-1]), *near, *([str(out[-1])] if (out := _left_out(item)) else [])}
    before: dict[str, Any] | None = None
    while errors and before != data:
        before, data = data, copy.deepcopy(data)
        for item in errors:
            _leave_out(data, _left_out(item))
        built, errors = _build(kind, data)
    return Checked(built, list(dict.fromkeys(lines)), at_fault)


def _build(kind: type[Any], data: dict[str, Any]) -> tuple[Any, list[Any]]:
    """`kind` and no errors, or None and pydantic's."""
    try:
        # as JSON, since strict Python mode refuses a dict where a dataclass is wanted
        return _adapter(kind).validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, error.errors()


def _path(item: Any) -> list[str | int]:
    """Where the user wrote what pydantic's error is about."""
    return [part for part in item["loc"] if not _is_type_tag(part)]


def _left_out(item: Any) -> list[str | int]:
    """What to build without, for an error: the key, or the table that lacks one; of a list all items, since those
    behind would move up."""
    path = _path(item)[: -1 if item["type"] in MISSING else None]
    return path[:-1] if path and isinstance(path[-1], int) else path


def _leave_out(data: dict[str, Any], path: Sequence[str | int]) -> None:
    here: Any = data
    for part in path[:-1]:
        inside = (
            part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        )
        here = here[part] if inside else None
    if path and isinstance(here, dict):
        here.pop(path[-1], None)


def field_names(kind: Any, path: Sequence[str | int]) -> list[str]:
    """Keys that stand at `path` below dataclass `kind`; [] where the path leaves the schema. In a union of dataclasses
    the path names the one that is meant, as pydantic does."""
    for part in path:
        kind = _type_at(kind, part)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def json_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors; `[model]` is open, since each family adds its own keys."""
    schema = _adapter(Job).json_schema()
    model = schema["$defs"]["Model"]
    del model["properties"]["overrides"]
    model["additionalProperties"] = True
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "nanovl job"}


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Field -> its docstring, from the schema's source."""
    properties = _adapter(kind).json_schema()["properties"]
    return {name: text.get("description", "") for name, text in properties.items()}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    for part in _dataclasses_below(kind):
        part.__pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return TypeAdapter(kind)


def _dataclasses_below(kind: Any) -> list[Any]:
    found: list[Any] = []
    todo = [kind]
    while todo:
        here = todo.pop()
        if dataclasses.is_dataclass(here) and here not in found:
            found.append(here)
            todo += typing.get_type_hints(here).values()
        todo += typing.get_args(here)
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return (
            json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        )  # a run's resolved config.json
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"--config {path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid {path.suffix.lstrip('.').upper() or 'TOML'}: {error}") from None


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
        kind = _type_at(kind, part)
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False, "none": None, "None": None}.get(text, text)


def _type_at(kind: Any, part: str | int) -> Any:
    if typing.get_origin(kind) in (list, tuple, dict):
        return typing.get_args(kind)[-1]
    options = [a for a in typing.get_args(kind) if dataclasses.is_dataclass(a)] or [kind]
    for option in options:
        if dataclasses.is_dataclass(option):
            if len(options) > 1 and getattr(option, "__name__", "") == part:
                return option
            hint = typing.get_type_hints(option).get(str(part))
            if hint is not None:
                return hint
    return None


def _fold_model(data: dict[str, Any]) -> dict[str, Any]:
    """Move the family's keys of `[model]` into `overrides`; the registry checks them against the family's config."""
    model = data.get("model")
    if not isinstance(model, dict):
        return data
    own = {f.name for f in dataclasses.fields(Model)} - {"overrides"}
    folded = {k: v for k, v in model.items() if k in own}
    return {**data, "model": {**folded, "overrides": {k: v for k, v in model.items() if k not in own}}}


def _is_type_tag(part: str | int) -> bool:
    """pydantic names the member of a union that it tried; users did not write that."""
    return isinstance(part, str) and (
        part[:1].isupper() or "[" in part or part in ("str", "int", "float", "bool", "none")
    )


def _hint(near: list[str], known: list[str]) -> str:
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(known)}" if known else ""


def _wanted(item: Any) -> str:
    wanted = {
        "int_type": "wants a whole number",
        "int_from_float": "wants a whole number",
        "float_type": "wants a number",
        "bool_type": "wants true or false",
        "string_type": "wants text",
        "list_type": "wants a list",
        "tuple_type": "wants a list",
        "dict_type": "wants a table",
        "dataclass_type": "wants a table",
        "dataclass_exact_type": "wants a table",
        "none_required": "wants nothing",
    }
    if item["type"] == "literal_error":
        near = difflib.get_close_matches(
            str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]), 1
        )
        return f"wants {item['ctx']['expected']}" + (f"; did you mean {near[0]!r}?" if near else "")
    return wanted.get(item["type"], item["msg"].removeprefix("Value error, "))
