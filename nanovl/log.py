"""The one place that prints: plain lines on the terminal of one rank, everything in `logs/rank_N.log`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Log:
    """One process's lines: `say` shows them on the ranks that LOG_RANK names (0), the file has all."""

    def __init__(self, rank: int = 0, folder: Path | None = None) -> None:
        self.rank = rank
        shown = os.environ.get("LOG_RANK", "0").split(",")
        self.shown = str(rank) in [name.strip() for name in shown]
        self.file: TextIO | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / f"rank_{rank}.log").open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        """One plain line, or several."""
        if self.shown:
            out(text)
        self._write(text)

    def warn(self, text: str) -> None:
        """A line that wants attention: yellow on a terminal, on stderr."""
        if self.shown:
            color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
            print(f"\033[33m{text}\033[0m" if color else text, file=sys.stderr, flush=True)
        self._write(f"warning: {text}")

    def note(self, text: str) -> None:
        """A line for the file only."""
        self._write(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
        """Aligned columns; numbers to the right."""
        self.say((f"{title}\n" if title else "") + table(header, rows))

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, text: str) -> None:
        if self.file is not None:
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self.file.flush()


def out(text: str = "", end: str = "\n") -> None:
    """Text to stdout, at once."""
    print(text, end=end, flush=True)


def aside(text: str) -> None:
    """Text to stderr for who waits: no part of the result."""
    print(text, file=sys.stderr, flush=True)


def err(text: str) -> None:
    """Text to stderr, red on a terminal."""
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[31m{text}\033[0m" if color else text, file=sys.stderr, flush=True)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """What is to be called with the bytes of each step of `total`: a bar on a terminal, elsewhere a line a minute."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        shown = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda nbytes: bar.advance(task, nbytes)
        return
    done, began = 0, time.monotonic()
    last = began

    def count(nbytes: int) -> None:
        nonlocal done, last
        done += nbytes
        if (now := time.monotonic()) - last >= 60:
            last = now
            rate = done / (now - began) / 1e6
            print(
                f"  {done / 1e9:,.1f} of {total / 1e9:,.1f} GB, {rate:,.0f} MB/s", file=sys.stderr, flush=True
            )

    yield count


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain aligned columns, two spaces apart, numbers to the right."""
    cells = [[str(c) for c in header], *([_cell(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    lines = (
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        for row in cells
    )
    return "\n".join("  " + line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
