"""`nanovl config check|show|schema`, and the flags that every command with a job shares."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovl.config.load import field_docs, job_to_dict, json_schema
from nanovl.config.schema import Job
from nanovl.errors import ConfigError
from nanovl.log import out


@dataclass(frozen=True)
class JobFlags:
    """A command line about a job, taken apart."""

    files: list[str]
    """--config files, in order."""
    flags: list[str]
    """--section.key=value settings, in order."""
    switches: dict[str, str]
    """The command's own options; "" for one without a value."""


def parse_job_flags(argv: Sequence[str], command: str, extra: Mapping[str, str] | None = None) -> JobFlags:
    """Split `--config FILE`, settings, and the command's `extra` options (name -> help; `--name=X` takes a value).

    Prints help and exits 0 on --help. Raises ConfigError for anything else.
    """
    extra = extra or {}
    values = {name.partition("=")[0]: "=" in name for name in extra}
    files, flags, switches = [], [], {}
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name in ("-h", "--help"):
            out(job_help(command, extra))
            raise SystemExit(0)
        if name == "--config" or values.get(name):
            if not equals:
                if not rest:
                    raise ConfigError(f"{name}: needs a value")
                value = rest.pop(0)
            if name == "--config":
                files.append(value)
            else:
                switches[name] = value
        elif name in values:
            switches[name] = ""
        elif arg.startswith("--") and "." in name:
            flags.append(arg)
            if not equals and rest and not rest[0].startswith("--"):
                flags.append(rest.pop(0))
        else:
            near = difflib.get_close_matches(name, ["--config", *values], 1)
            hint = f"did you mean {near[0]}?" if near else "settings are written --section.key=value"
            raise ConfigError(f"{arg}: unknown option; {hint}")
    return JobFlags(files, flags, switches)


def job_help(command: str, extra: Mapping[str, str]) -> str:
    """Usage and every setting with its default and meaning."""
    lines = [
        f"usage: nanovl {command} --config FILE [--config FILE ...] [--section.key=value ...] {' '.join(extra)}",
        "",
    ]
    lines += [f"  {name}  {text}" for name, text in extra.items()]
    for section in dataclasses.fields(Job):
        kind = typing.get_type_hints(Job)[section.name]
        lines += ["", f"[{section.name}]"]
        for field, doc in field_docs(kind).items():
            default = getattr(kind(), field)
            shown = "" if dataclasses.is_dataclass(default) else f" = {json.dumps(default)}"
            lines.append(f"  --{section.name}.{field}{shown}\n        {doc}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`nanovl config check|show --config FILE [...] [--world-size=N]`, `nanovl config schema`."""
    verbs = ("check", "show", "schema")
    if not argv or argv[0] in ("-h", "--help"):
        out(
            "usage: nanovl config check|show --config FILE [--section.key=value ...] [--world-size=N]\n"
            "       nanovl config schema"
        )
        return 0
    if argv[0] not in verbs:
        near = difflib.get_close_matches(argv[0], verbs, 1)
        raise ConfigError(
            f"{argv[0]}: no such verb; " + (f"did you mean {near[0]!r}?" if near else "check, show or schema")
        )
    if argv[0] == "schema":
        out(json.dumps(json_schema(), indent=2))
        return 0
    from nanovl.build import check_everywhere
    from nanovl.registry import read_job, resolve_model, spec_to_dict, trained_vocabulary

    asked = parse_job_flags(
        argv[1:], f"config {argv[0]}", {"--world-size=N": "ranks to check the degrees and batch for"}
    )
    world_size = _world_size(asked.switches.get("--world-size", "1"))
    job = read_job(asked.files, asked.flags, world_size=world_size)
    if argv[0] == "show":
        shown: dict[str, Any] = job_to_dict(job)
        shown["model"] = spec_to_dict(resolve_model(job.model, trained_vocabulary(job)))
        out(json.dumps(shown, indent=2))
    else:
        check_everywhere(job, world_size)
        out(f"ok: {' + '.join(asked.files) or 'the defaults'}")
    return 0


def _world_size(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--world-size = {text!r}: wants a whole number above 0")
    return int(text)
