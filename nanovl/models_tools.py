"""`nanovl models list|show`: the architectures, and the size, layers, memory and FLOPs of one."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanovl.config_tools import JobFlags, parse_job_flags
from nanovl.errors import ConfigError
from nanovl.log import out, table

if TYPE_CHECKING:
    from nanovl.anatomy import Anatomy, Part
    from nanovl.config.schema import Optimizer
    from nanovl.spec import ModelFamily, ModelSpec

USAGE = """usage: nanovl models list [--json]
       nanovl models show FAMILY[:FLAVOR] [--context=N] [--json] [--model.key=value ...]
       nanovl models show --config FILE [...] [--context=N] [--json] [--section.key=value ...]"""
OPTIONS = {
    "--context=N": "tokens of a row whose FLOPs and cache are told; 4,096 and the model's own without it",
    "--json": "the numbers as JSON",
}
WIDTH = 96
TIE = "\N{NO-BREAK SPACE}"
LAYOUT = ("blocks", "pattern", "prefix", "suffix", "mtp")
"""Fields of a config that the list of layers says."""


def main(argv: list[str]) -> int:
    """`nanovl models list|show`. Raises ConfigError for a wrong command line or model."""
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        out(USAGE)
        return 0
    if verb == "list":
        wrong = [arg for arg in rest if arg != "--json"]
        if wrong:
            raise ConfigError(f"{wrong[0]}: unknown option; nanovl models list takes --json alone")
        _list(as_json="--json" in rest)
        return 0
    if verb != "show":
        near = difflib.get_close_matches(verb, ("list", "show"), 1)
        raise ConfigError(
            f"{verb}: no such verb; " + (f"did you mean {near[0]!r}?" if near else "list or show")
        )
    name = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    asked = parse_job_flags(rest, "models show FAMILY[:FLAVOR] |", OPTIONS)
    _show(name, asked)
    return 0


def _list(*, as_json: bool) -> None:
    from nanovl.registry import MODELS, family

    found = [(family(name), _sizes(family(name))) for name in MODELS]
    if as_json:
        out(json.dumps([_family_numbers(*pair) for pair in found], indent=2))
        return
    width = max(len(one.name) for one, _ in found) + 2
    for one, sizes in found:
        said = ", ".join(_size(*size) for size in sizes)
        out(f"{one.name.ljust(width)}{_wrapped(one.summary, width)}")
        out(f"{' ' * width}{_wrapped(said, width)}")
    out("\nThe first size is the default. nanovl models show FAMILY:SIZE says what one is made of.")


def _sizes(one: ModelFamily) -> list[tuple[str, int, int]]:
    """(flavor, parameters, those that a token goes through) of every size."""
    from nanovl.anatomy import active_parameters, meta_model
    from nanovl.spec import ModelSpec

    sizes = []
    for flavor, make in one.flavors.items():
        model = meta_model(ModelSpec(one, make(), flavor))
        total, active = sum(p.numel() for p in model.parameters()), active_parameters([model])
        sizes.append((flavor, total, active))
    return sizes


def _size(flavor: str, total: int, active: int) -> str:
    return _whole(f"{flavor} {short(total)}" + ("" if active == total else f" ({short(active)} active)"))


def _family_numbers(one: ModelFamily, sizes: list[tuple[str, int, int]]) -> dict[str, Any]:
    return {
        "family": one.name,
        "summary": one.summary,
        "architecture": _architecture(one),
        "flavors": [{"flavor": f, "parameters": total, "active": active} for f, total, active in sizes],
    }


def _architecture(one: ModelFamily) -> str | None:
    """The class of transformers, where it has one."""
    return None if one.hf is None or one.hf.config_to_hf is None else one.hf.architecture


def _show(name: str, asked: JobFlags) -> None:
    from nanovl.anatomy import anatomy

    spec, optimizer = _spec(name, asked)
    own = int(spec.config.max_position_embeddings)
    contexts = (
        [_context(asked.switches["--context"])] if "--context" in asked.switches else [min(4096, own), own]
    )
    found = anatomy(spec, optimizer, contexts)
    out(json.dumps(as_numbers(found), indent=2) if "--json" in asked.switches else "\n".join(as_text(found)))


def _context(text: str) -> int:
    if not re.fullmatch(r"[0-9]+|[0-9]{1,3}(,[0-9]{3})+", text) or int(text.replace(",", "")) < 1:
        raise ConfigError(f"--context = {text!r}: wants one whole number above 0")
    return int(text.replace(",", ""))


def _spec(name: str, asked: JobFlags) -> tuple[ModelSpec, Optimizer]:
    """The model of a name, or of a job, and what would train it; overrides over either. Without a job the vocabulary is
    the model's own."""
    from nanovl.config.load import load_job, load_model
    from nanovl.config.schema import Optimizer
    from nanovl.initial import vocabulary
    from nanovl.registry import resolve_model

    if not name and not asked.files:
        raise ConfigError("models show: name a model, such as qwen3:0.6b, or a job with --config FILE")
    named = []
    if name:
        family_name, flavor = find(name)
        named = [f"--model.name={family_name}", f"--model.flavor={flavor}"]
    if not asked.files:
        return resolve_model(load_model([*named, *asked.flags]), None), Optimizer()
    job = load_job(asked.files, [*named, *asked.flags])
    return resolve_model(job.model, vocabulary(job)), job.optimizer


def find(text: str) -> tuple[str, str]:
    """Family and flavor of `family`, `family:flavor`, or of a flavor that one family alone has among those whose names
    begin so: `qwen3:30b-a3b` is qwen3_moe's. Raises ConfigError with what is near."""
    from nanovl.registry import MODELS, family, sizes

    wanted = text.lower()
    name, colon, flavor = wanted.partition(":")
    if name in MODELS and (not colon or flavor in family(name).flavors):
        return name, flavor or next(iter(family(name).flavors))
    every = sizes()
    fits = [
        size for size in every if name and size.startswith(name) and size.endswith(f":{flavor}") and flavor
    ]
    if len(fits) == 1:
        name, _, flavor = fits[0].partition(":")
        return name, flavor
    begins = [size for size in every if name and size.startswith(name) and f":{flavor}" in size and flavor]
    near = (
        fits
        or begins
        or [size for size in every if wanted in size]
        or difflib.get_close_matches(wanted, every, 3)
    )
    near = near or [
        f"{close}:{next(iter(family(close).flavors))}" for close in difflib.get_close_matches(name, MODELS, 3)
    ]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "nanovl models list shows what there is"
    raise ConfigError(f"{text}: no such model; {hint}")


def as_numbers(found: Anatomy) -> dict[str, Any]:
    """One JSON object: parameters, bytes, FLOPs."""
    spec, weights = found.spec, 4 * found.parameters
    names = spec.config.layer_names()
    return {
        "family": spec.family.name,
        "flavor": spec.flavor,
        "summary": spec.family.summary,
        "architecture": _architecture(spec.family),
        "cannot_be_written": _cannot_be_written(spec),
        "parameters": {
            "total": found.parameters,
            "active": found.active,
            "without_input_embeddings": found.parameters - found.lookups,
            "active_without_input_embeddings": found.active - found.lookups,
        },
        "parts": [asdict(part) for part in found.parts],
        "layers": names,
        "bytes": {
            "weights": weights,
            "gradients": weights,
            "optimizer": found.optimizer_bytes,
            "weights_bfloat16": weights // 2,
            "cache_per_token": found.bytes_per_token,
            "states_per_request": found.bytes_per_request,
        },
        "flops_per_token": [asdict(cost) for cost in found.costs],
        "config": asdict(spec.config),
    }


def as_text(found: Anatomy) -> list[str]:
    """The same for a terminal."""
    spec = found.spec
    name = f"{spec.family.name}:{spec.flavor}  "
    return [
        name + _wrapped(spec.family.summary, len(name)),
        *_known(spec),
        "",
        table(["parameters", "total", "active"], _parameter_rows(found)),
        "",
        *_layers(spec),
        "",
        *_memory(found),
        "",
        *_costs(found),
    ]


def _known(spec: ModelSpec) -> list[str]:
    """The class of transformers, and what it would not compute."""
    if (architecture := _architecture(spec.family)) is None:
        return []
    line, wrong = f"  transformers: {architecture}", _cannot_be_written(spec)
    return [line, *(f"    not as changed: {_wrapped(one, 20)}" for one in wrong)]


def _cannot_be_written(spec: ModelSpec) -> list[str]:
    """Why transformers' class is not what this model computes; nothing where it is, or where there is none."""
    if spec.family.hf is None or spec.family.hf.config_to_hf is None:
        return []
    try:
        spec.family.hf.config_to_hf(spec.config)
    except ConfigError as error:
        return error.mistakes
    return []


def _parameter_rows(found: Anatomy) -> list[list[object]]:
    def label(part: Part) -> str:
        return f"{part.layers} x {part.name}" if part.layers else part.name

    rows: list[list[object]] = [[label(part), part.parameters, part.active] for part in found.parts]
    rows.append(["in all", found.parameters, found.active])
    if found.lookups:
        less = [total - found.lookups for total in (found.parameters, found.active)]
        rows.append(["without input embeddings", *less])
    return rows


def _layers(spec: ModelSpec) -> list[str]:
    """The order of the layers, and what their templates say, in the keys that change them."""
    from nanovl.anatomy import compact

    config = spec.config
    names = config.layer_names()
    lines = [f"  layers  {_wrapped(compact(names), 10)}"]
    mtp = getattr(config, "mtp", None)
    for name in dict.fromkeys([*names, *([config.mtp_block()] if mtp else [])]):
        lines.append(f"  {name}")
        block = config.blocks[name]
        lines += [
            f"    {part.ljust(6)}{_wrapped(_settings(getattr(block, part)), 10)}" for part in ("mixer", "ffn")
        ]
        rest = _settings(block, leave_out=("mixer", "ffn"))
        lines += [f"    {_wrapped(rest, 4)}"] if rest else []
    if mtp:
        given = {"hidden": mtp.hidden, "loss_weight": mtp.loss_weight}
        lines.append(f"  mtp     {mtp.num_layers} x {config.mtp_block()}: {_wrapped(_said(given), 10)}")
    whole = {"hidden_size": config.hidden_size}
    lines.append(f"  model   {_wrapped(_settings(config, whole, leave_out=LAYOUT), 10)}")
    return lines


def _settings(config: Any, first: dict[str, Any] | None = None, leave_out: Sequence[str] = ()) -> str:
    """`key = value` of whatever differs from its default, its kind before all."""
    from nanovl.report.facts import settings

    found = {key: value for key, value, differs in settings(config) if differs}
    kept = {key: value for key, value in found.items() if key.partition(".")[0] not in leave_out}
    said = _said({**(first or {}), **kept})
    kind = getattr(config, "kind", "")
    return f"{kind}: {said}" if kind else said


def _said(values: dict[str, Any]) -> str:
    return ", ".join(_whole(f"{key} = {_value(value)}") for key, value in values.items())


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}".replace("e+0", "e")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _memory(found: Anatomy) -> list[str]:
    weights = 4 * found.parameters
    rows: dict[str, tuple[int, int]] = {
        "weights": (weights, weights // 2),
        "gradients": (weights, 0),
        **{f"optimizer state, {rule}": (size, 0) for rule, size in found.optimizer_bytes.items()},
    }
    rows["in all, without activations"] = (sum(train for train, _ in rows.values()), weights // 2)
    unit, size = _unit(weights)
    shown = [
        [name, f"{train / size:,.2f}", f"{serve / size:,.2f}" if serve else ""]
        for name, (train, serve) in rows.items()
    ]
    cache = f"  cache   {found.bytes_per_token:,} bytes a token in bfloat16"
    if found.bytes_per_request:
        cache += f", and {found.bytes_per_request:,} of states a request"
    return [_right([f"memory, {unit}", "training, float32", "serving, bfloat16"], shown), cache]


def _costs(found: Anatomy) -> list[str]:
    unit, size = _unit(found.costs[-1].cache_bytes)
    rows = [
        [
            f"{cost.context:,}",
            f"{cost.forward / 1e9:,.4g}",
            f"{cost.training / 1e9:,.4g}",
            f"{100 * cost.scores:.1f}%",
            f"{cost.cache_bytes / size:,.3g}",
        ]
        for cost in found.costs
    ]
    head = ["context", "forward", "training", "of it attention", f"cache of a row, {unit}"]
    return ["  GFLOP a token, in a row that is one document", _right(head, rows)]


def _unit(size: int) -> tuple[str, int]:
    """GiB, or a smaller one in which `size` is a number above 1."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((unit for unit in units if size >= unit[1]), units[-1])


def _right(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns of text, all but the first to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  "
        + "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def _wrapped(text: str, indent: int) -> str:
    """`text` after `indent` columns, in lines of WIDTH."""
    lines = textwrap.wrap(text, WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines).replace(TIE, " ")


def _whole(text: str) -> str:
    """`text`, not to be broken by `_wrapped`."""
    return text.replace(" ", TIE)


def short(count: int) -> str:
    """1.24B, 671B, 1.03T: three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return str(count)
