"""`nanovl report`: what a run was, what it reached and how to make it again; or several runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nanovl.errors import ConfigError, RunError
from nanovl.log import out
from nanovl.plots import Curves, draw
from nanovl.report.comparison import comparison_page
from nanovl.report.facts import Facts, read_facts
from nanovl.report.pages import bpb_in_words, progress, run_page
from nanovl.run import Run


def main(argv: list[str]) -> int:
    """`nanovl report RUN [RUN ...] [--out FILE.md]`. Raises NanovlError; SystemExit(2) from argparse."""
    parser = argparse.ArgumentParser(
        prog="nanovl report", description="Write report.md and report.png of a run, or compare several runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", metavar="FILE.md", help="where to write; default for one run: report.md in its folder"
    )
    args = parser.parse_args(argv)
    runs = [Run(Path(name)) for name in args.runs]
    _check(runs, args.out)
    facts = [read_facts(run) for run in runs]
    file = Path(args.out) if args.out else runs[0].folder / "report.md"
    _write(file, facts)
    out(str(file))
    for one in facts:
        out(f"  {one.name}: {progress(one)}; {bpb_in_words(one)}")
    return 0


def write_report(run: Run) -> Path:
    """Write report.md and report.png into the run folder; returns the former. RunError if it is no run."""
    file = run.folder / "report.md"
    _write(file, [read_facts(run)])
    return file


def _check(runs: Sequence[Run], file: str | None) -> None:
    mistakes = []
    if file is None and len(runs) > 1:
        mistakes.append(
            f"--out: missing; {len(runs)} runs are compared in a file of their own, such as --out compare.md"
        )
    if file is not None and Path(file).suffix != ".md":
        mistakes.append(f"--out {file}: wants a name that ends in .md; the curves go beside it as .png")
    folders = [run.folder.resolve() for run in runs]
    mistakes += [
        f"{run.folder}: named twice; name it once" for i, run in enumerate(runs) if folders[i] in folders[:i]
    ]
    if mistakes:
        raise ConfigError(mistakes)


def _write(file: Path, facts: Sequence[Facts]) -> None:
    picture = file.with_suffix(".png")
    names = _names(facts)
    text = (
        run_page(facts[0], picture.name) if len(facts) == 1 else comparison_page(facts, names, picture.name)
    )
    curves = [
        Curves(name, one.train, one.val, one.compressors) for name, one in zip(names, facts, strict=True)
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(curves, picture)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{file}: cannot be written: {error}; choose another place with --out FILE.md"
        ) from None


def _names(facts: Sequence[Facts]) -> list[str]:
    """What tells the runs apart: the folder's name, or where two share one, its path as given."""
    names = [one.name for one in facts]
    return names if len(set(names)) == len(names) else [str(one.run.folder) for one in facts]
