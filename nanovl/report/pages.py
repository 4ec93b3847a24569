"""Pages of `nanovl report`, in Markdown. What a run's files do not hold is said in words, never made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from nanovl.metrics import duration
from nanovl.report.facts import LOSS_RECORDS, Facts, settings

UNKNOWN = "not known"


def run_page(facts: Facts, picture: str) -> str:
    """report.md of one run; `picture` is the name of its curves."""
    changed = [f"{key} = {as_json(value)}" for key, value, differs in settings(facts.job) if differs]
    return page(
        f"# {facts.name}",
        facts.job.job.description,
        f"{_first_upper(progress(facts))}. {_first_upper(ending(facts, -1))}.",
        table(("", ""), summary(facts)),
        "## Held-out text",
        *held_out(facts),
        "## Curves",
        curves(picture),
        "## Samples",
        *last_samples(facts),
        "## How it was made",
        *sessions(facts),
        "## Settings that differ from the defaults",
        fence("\n".join(changed)) if changed else "None.",
    )


def progress(facts: Facts) -> str:
    """How far it came."""
    if not facts.train:
        return "no step was logged"
    planned = facts.job.training.steps
    of = f" of {planned:,} steps" if planned else " steps (how many were planned is not known)"
    step, tokens, seconds = (facts.last[key] for key in ("step", "tokens", "seconds"))
    return f"{step:,}{of}, {tokens:,} tokens in {duration(seconds)} of training"


def ending(facts: Facts, index: int) -> str:
    """Why session `index` ended, as far as run.json knows."""
    if not facts.sessions:
        return "run.json records no session: these weights were not trained here"
    session = facts.sessions[index]
    reason: str = session["exit_reason"]
    if reason != "running":
        return " ".join(reason.split())
    if session is not facts.sessions[-1]:
        return "killed: it never said why it ended"
    if facts.last["step"] >= facts.job.training.steps > 0:
        return "all steps are taken, and the session had not closed when this was written"
    return "still running when this was written, or killed since"


def bpb_in_words(facts: Facts) -> str:
    """The one number, beside gzip."""
    if not facts.measured:
        return "held-out text not measured"
    ratio = "" if facts.gzip_ratio is None else f", {facts.gzip_ratio:.3f} x gzip -9"
    return f"{facts.measured['val/bpb']:.4f} bits per byte{ratio}"


def summary(facts: Facts) -> list[tuple[str, str]]:
    """Rows of the first table."""
    training, latest = facts.job.training, facts.sessions[-1] if facts.sessions else {}
    rows, length = training.global_batch_size, training.seq_len
    dtype = training.mixed_precision_param
    if dtype == "auto":
        dtype = latest.get("param_dtype", "chosen by the machine, in logs/rank_0.log")
    logged = f"mean of the last {min(LOSS_RECORDS, len(facts.train))} logged steps"
    windows = "median after the first window" if len(facts.train) > 1 else "the only window, with its warm-up"
    no_mfu = f"{UNKNOWN}: no peak is on record for this device" if facts.train else UNKNOWN
    planned = f"{training.steps:,}" if training.steps else "an unknown number"
    return [
        *_model_rows(facts),
        ("steps", f"{facts.last['step']:,} of {planned}"),
        ("tokens", f"{facts.last['tokens']:,}"),
        ("tokens a step", f"{rows * length:,} ({rows:,} rows)" if rows else UNKNOWN),
        ("sequence length", f"{length:,} tokens"),
        ("training loss", known(facts.loss, lambda v: f"{v:.4f} nats per token ({logged})")),
        ("training time", f"{duration(facts.last['seconds'])}, without validation, samples and saving"),
        ("tokens per second", known(facts.tokens_per_second, lambda v: f"{v:,.0f} ({windows})")),
        ("FLOPs", f"{facts.last['flops']:.3g}"),
        ("MFU", known(facts.mfu, lambda v: f"{100 * v:.1f}%", no_mfu)),
        ("peak memory", known(facts.peak_gib, lambda v: f"{v:.2f} GiB on rank 0")),
        ("data", data_use(facts)),
        ("hardware", latest.get("hardware", UNKNOWN)),
        ("mesh", latest.get("mesh", UNKNOWN)),
        ("compute dtype", f"{dtype}; gradients summed in {training.mixed_precision_reduce}"),
    ]


def _model_rows(facts: Facts) -> list[tuple[str, str]]:
    model = facts.architecture
    if isinstance(model, str):
        return [
            ("architecture", facts.job.model.name),
            ("flavor", facts.job.model.flavor or "the default"),
            ("parameters", f"{UNKNOWN}: {model}"),
        ]
    size = f"{model.layers} layers, hidden size {model.hidden_size:,}, vocabulary {model.vocab_size:,}"
    changes = ", changed by the settings below" if facts.job.model.overrides else ""
    return [
        ("architecture", f"{model.family}: {size}"),
        ("flavor", (model.flavor or "none") + changes),
        ("parameters", f"{model.parameters:,} ({model.without_embeddings:,} without embeddings)"),
    ]


def data_use(facts: Facts) -> str:
    """How much of the rows and of the text was used."""
    found = facts.data_use
    if found is None:
        return f"utilisation {UNKNOWN}"
    return (
        f"{100 * found.utilisation:.1f}% of positions carried loss, {100 * found.cropped:.1f}% of the tokens "
        f"read were cropped away, epoch {found.epoch} at the end (rank 0)"
    )


def held_out(facts: Facts) -> list[str]:
    """The model beside compressors on the same text, or why there is no such table."""
    found, gzip = facts.measured, facts.compressors.get("gzip -9")
    if not found:
        asked = facts.job.validation.freq > 0
        why = "the run did not reach an evaluation" if asked else "`validation.freq` is 0"
        return [f"Not measured: {why}."]
    rows = [(f"model, step {found['step']:,}", found["val/bpb"]), *facts.compressors.items()]
    cells = [(name, f"{bpb:.4f}", f"{bpb / gzip:.3f}" if gzip else UNKNOWN) for name, bpb in rows]
    header = (f"on the same {found['val/bytes']:,} bytes", "bits per byte", "ratio to gzip -9")
    lines = [table(header, cells, numbers=2)]
    if not gzip:
        lines.append("gzip and xz were not measured: that happens at the end of the run.")
    elif facts.val and facts.val[-1]["step"] > found["step"]:
        later = facts.val[-1]
        lines.append(
            f"Trained on to step {later['step']:,}: {later['val/bpb']:.4f} bits per byte "
            f"on {later['val/bytes']:,} bytes, without gzip and xz beside it."
        )
    return lines


def last_samples(facts: Facts) -> list[str]:
    """The last continuations, verbatim."""
    if not facts.samples:
        asked = facts.job.sampling.prompts
        why = "the run did not reach a step that makes samples" if asked else "`sampling.prompts` is empty"
        return [f"None: {why}."]
    lines = [f"After step {facts.samples[0]['step']:,}, each prompt and how the model went on:"]
    for sample in facts.samples:
        lines += [code(as_json(sample["prompt"])), fence(sample["completion"])]
    return lines


def sessions(facts: Facts) -> list[str]:
    """Command, commit, versions and end of every session."""
    if not facts.sessions:
        return [f"{UNKNOWN.capitalize()}: {ending(facts, -1)}."]
    lines = []
    for index, session in enumerate(facts.sessions):
        versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
        rows = [
            ("started", session["started"]),
            ("ended", session.get("ended", UNKNOWN)),
            ("exit reason", ending(facts, index)),
            ("commit", commit(session)),
            ("versions", f"python {session['python']}, {versions}"),
            ("hardware", session["hardware"]),
            ("ranks", f"{session['world_size']:,}"),
            ("mesh", session["mesh"]),
        ]
        lines += [f"### Session {index + 1}", fence(session["command"], "sh"), table(("", ""), rows)]
    return lines


def commit(session: dict[str, Any], digits: int = 40) -> str:
    """The git state a session ran from."""
    sha, diff = session["git_sha"][:digits], session["git_diff"]
    if not sha:
        return f"{UNKNOWN}: not run from a git checkout"
    if not session["git_dirty"]:
        return f"{sha}, clean"
    return f"{sha}, dirty ({f'changes in {diff}' if diff else 'files that git does not track'})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A table whose last `numbers` columns stand to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def fence(text: str, language: str = "text") -> str:
    """A code block, fenced by more backticks than `text` has in a row."""
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def code(text: str) -> str:
    """`text` as code within a line."""
    ticks = "`" * (_longest_ticks(text) + 1)
    return f"{ticks}{text}{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def curves(picture: str) -> str:
    """The picture, and its words for who cannot see it."""
    return f"![Loss, bits per byte on held-out text, learning rate, gradient norm and speed]({picture})"


def known(value: float | None, words: Callable[[float], str], otherwise: str = UNKNOWN) -> str:
    """`words` of a number that is there."""
    return otherwise if value is None else words(value)


def as_json(value: Any) -> str:
    """`value` as a job file and a flag spell it."""
    return json.dumps(value, ensure_ascii=False)


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def page(*blocks: str) -> str:
    """The blocks that are not empty, a line between them."""
    return "\n\n".join(block for block in blocks if block) + "\n"
