"""The page of several runs: a row each, curves over each other, and where their settings part."""

from __future__ import annotations

from collections.abc import Sequence

from nanovl.metrics import duration
from nanovl.report.facts import Facts, settings
from nanovl.report.pages import UNKNOWN, as_json, commit, curves, ending, known, page, table

RESULT_COLUMNS = (
    "parameters",
    "steps",
    "tokens",
    "training loss",
    "bits per byte",
    "ratio to gzip -9",
    "tokens per second",
    "MFU",
    "training time",
    "peak GiB",
)


def comparison_page(facts: Sequence[Facts], names: Sequence[str], picture: str) -> str:
    """The report of `facts`, called `names`; `picture` is the name of their curves."""
    results = [(name, *_result(one)) for name, one in zip(names, facts, strict=True)]
    origins = [(name, *_origin(one)) for name, one in zip(names, facts, strict=True)]
    rows = differing_settings(facts)
    return page(
        f"# Comparison of {len(facts)} runs",
        table(("run", *RESULT_COLUMNS), results, numbers=len(RESULT_COLUMNS)),
        *cautions(facts),
        curves(picture),
        "## Where they come from",
        table(("run", "description", "architecture", "hardware", "ranks", "commit", "end"), origins),
        "## Settings in which they differ",
        table(("setting", *names), rows) if rows else "None.",
    )


def differing_settings(facts: Sequence[Facts]) -> list[tuple[str, ...]]:
    """Dotted key and each run's value, where these are not all the same; names and places do not count."""
    jobs = [{key: as_json(value) for key, value, _ in settings(one.job)} for one in facts]
    keys = dict.fromkeys(key for job in jobs for key in job)
    rows = [(key, *(job.get(key, "not set") for job in jobs)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("job.run_dir", "job.description")]


def _result(facts: Facts) -> tuple[str, ...]:
    model, measured = facts.architecture, facts.measured
    return (
        UNKNOWN if isinstance(model, str) else f"{model.parameters:,}",
        f"{facts.last['step']:,}",
        f"{facts.last['tokens']:,}",
        known(facts.loss, lambda v: f"{v:.4f}"),
        f"{measured['val/bpb']:.4f}" if measured else "not measured",
        known(facts.gzip_ratio, lambda v: f"{v:.3f}", "not measured"),
        known(facts.tokens_per_second, lambda v: f"{v:,.0f}"),
        known(facts.mfu, lambda v: f"{100 * v:.1f}%"),
        duration(facts.last["seconds"]),
        known(facts.peak_gib, lambda v: f"{v:.2f}"),
    )


def _origin(facts: Facts) -> tuple[str, ...]:
    model, latest = facts.architecture, facts.sessions[-1] if facts.sessions else None
    size = "" if isinstance(model, str) else f", {model.layers} layers, hidden size {model.hidden_size:,}"
    return (
        facts.job.job.description,
        f"{facts.job.model.name}{size}",
        latest["hardware"] if latest else UNKNOWN,
        f"{latest['world_size']:,}" if latest else UNKNOWN,
        commit(latest, 10) if latest else UNKNOWN,
        ending(facts, -1),
    )


def cautions(facts: Sequence[Facts]) -> list[str]:
    """What in the table must not be compared."""
    texts = len({(one.measured["val/bytes"], *one.compressors.items()) for one in facts if one.measured})
    tokenizers = len({one.tokenizer for one in facts})
    found = [
        (texts, "Bits per byte do not compare here: they were measured on different held-out text."),
        (tokenizers, "Training losses do not compare here: they count tokens of different tokenizers."),
    ]
    return [caution for kinds, caution in found if kinds > 1]
