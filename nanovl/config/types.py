"""Plain values -> the dataclasses of a schema, by pydantic: strict, no unknown key, every mistake one line."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
"""What pydantic calls keys that nobody knows, and keys that have to be there."""


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


def check_types(
    kind: type[Any],
    data: dict[str, Any],
    origins: dict[str, str],
    prefix: str = "",
    usual: Mapping[str, Any] = MappingProxyType({}),
) -> Checked:
    """`kind` built from `data`; `prefix` stands before every dotted key, `usual` has what to take for wrong values."""
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
        beside = _at(data, path[:-1])
        meant = [name for name in near if not (isinstance(beside, Mapping) and name in beside)]
        at_fault |= {part for part in (*path[-1:], *meant) if isinstance(part, str)}
    before: dict[str, Any] | None = None
    while errors and before != data:
        before, data = data, copy.deepcopy(data)
        for path in map(_left_out, errors):
            _leave_out(data, path, usual)
            at_fault |= {str(part) for part in path[-1:]}
        built, errors = _build(kind, data)
    return Checked(built, list(dict.fromkeys(lines)), at_fault)


def _build(kind: type[Any], data: dict[str, Any]) -> tuple[Any, list[Any]]:
    """`kind` and no errors, or None and pydantic's."""
    try:
        # as JSON, since strict Python mode refuses a dict where a dataclass is wanted
        return adapter(kind).validate_json(json.dumps(data, default=str), strict=True), []
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


def _leave_out(data: dict[str, Any], path: Sequence[str | int], usual: Mapping[str, Any]) -> None:
    *above, last = path or [""]
    here, there = _at(data, above), _at(usual, above)
    if isinstance(here, dict):
        here.pop(last, None)
        if isinstance(there, Mapping) and last in there:
            here[last] = there[last]


def _at(value: Any, path: Sequence[str | int]) -> Any:
    """What stands at `path` below `value`; None where nothing does."""
    for part in path:
        inside = (
            part in range(len(value))
            if isinstance(value, list)
            else isinstance(value, Mapping) and part in value
        )
        value = value[part] if inside else None
    return value


def field_names(kind: Any, path: Sequence[str | int]) -> list[str]:
    """Keys that stand at `path` below dataclass `kind`; [] where the path leaves the schema. In a union of dataclasses
    the path names the one that is meant, as pydantic does."""
    for part in path:
        kind = type_at(kind, part)
    # of a section that may be none, the section
    sections = [option for option in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(option)]
    return [f.name for f in dataclasses.fields(sections[0])] if len(sections) == 1 else []


def adapter(kind: type[Any]) -> TypeAdapter[Any]:
    for part in _dataclasses_below(kind):
        part.__pydantic_config__ = ConfigDict(
            extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
        )
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


def spelled(kind: Any, data: Any) -> Any:
    """`data` with "none" for None where the schema has that word: a flag's `none` may mean either."""
    if isinstance(data, dict):
        return {key: spelled(type_at(kind, key), value) for key, value in data.items()}
    return "none" if data is None and "none" in typing.get_args(kind) else data


def type_at(kind: Any, part: str | int) -> Any:
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
        "finite_number": "wants a finite number",
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
