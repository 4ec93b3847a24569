"""Curves of one run or several as one PNG: loss, held-out bits per byte, learning rate and norm, speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart by colour-blind readers, and by lightness in print
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
GREY = "#6b6b6b"
FEW_POINTS = 30  # up to here every point gets a marker: a line through three says too much
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run: records of metrics.jsonl, oldest first."""

    name: str
    train: list[dict[str, Any]]
    """Records with `train/loss`."""
    val: list[dict[str, Any]]
    """Records with `val/bpb`."""
    compressors: dict[str, float]
    """Bits per byte of compressors on the last held-out text; empty where they were not measured."""


@dataclass(frozen=True)
class _Line:
    """How one run looks in every panel."""

    curves: Curves
    color: str
    style: str
    alone: bool
    """Whether it is the only run: then there is room for labels."""
    unit: float
    """Tokens that one unit of the horizontal axis stands for."""

    def tokens(self, records: Iterable[dict[str, Any]]) -> list[float]:
        return [r["tokens"] / self.unit for r in records]

    def plot(
        self, axes: Any, records: Sequence[dict[str, Any]], values: Sequence[float], **look: Any
    ) -> None:
        given = {"color": self.color, "linestyle": self.style, "linewidth": 1.4, "markersize": 3.5}
        given["marker"] = "o" if len(values) <= FEW_POINTS else ""
        axes.plot(self.tokens(records), values, **{**given, **look})


def draw(runs: Sequence[Curves], file: Path) -> None:
    """Write the four panels to the PNG `file`, 1600 pixels wide; a panel without numbers says so."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    last = [r["tokens"] for run in runs for r in (*run.train, *run.val)]
    unit, unit_name = token_unit(max(last, default=0))
    looks = [(COLORS[i % len(COLORS)], LINES[i // len(COLORS) % len(LINES)]) for i in range(len(runs))]
    lines = [_Line(run, *look, len(runs) == 1, unit) for run, look in zip(runs, looks, strict=True)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(10, 6.6), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.0)
        )
        grid = figure.add_gridspec(4, 2)
        loss, bpb, speed = (
            figure.add_subplot(grid[place]) for place in (np.s_[:2, 0], np.s_[:2, 1], np.s_[2:, 1])
        )
        rate, norm = figure.add_subplot(grid[2, 0]), figure.add_subplot(grid[3, 0])
        _loss_panel(loss, lines)
        _bpb_panel(bpb, lines)
        _schedule_panels(rate, norm, lines)
        _speed_panel(speed, lines)
        for axes in (loss, bpb, rate, norm, speed):
            axes.set_xlim(0, 1.02 * max(last, default=1) / unit)
            axes.set_xlabel(f"tokens{unit_name}" if axes is not rate else "")
        rate.tick_params(labelbottom=False)
        if len(runs) == 1:
            figure.suptitle(runs[0].name, x=0.01, ha="left", fontsize=11)
        else:
            figure.legend(
                handles=[_key(line) for line in lines],
                loc="outside upper left",
                ncols=min(len(runs), 4),
                fontsize=9,
            )
        figure.savefig(file, dpi=160, metadata={"Software": None})


def token_unit(most: float) -> tuple[float, str]:
    """The unit in which `most` tokens is a number of one to four digits, and how an axis names it."""
    for size, name in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= size:
            return size, f" ({name})"
    return 1.0, ""


def smooth(values: Sequence[float], half: int) -> list[float]:
    """Each value replaced by its place on the straight line fitted to the 2 `half` + 1 values around it.

    Inside, that is their mean. At the ends, where the window cannot be centred, a mean would lag.
    """
    import numpy as np

    y = np.asarray(values, dtype=np.float64)
    half = min(half, (len(y) - 1) // 2)
    count, places = 2 * half + 1, np.arange(len(y))
    first = np.clip(places - half, 0, len(y) - count)
    sums = [np.concatenate(([0.0], np.cumsum(part))) for part in (y, y * places)]
    total, moment = (part[first + count] - part[first] for part in sums)
    variance = max(count * (count**2 - 1) / 12, 1)  # of consecutive whole numbers, times their count
    slope = (moment - (first + half) * total) / variance
    return list((total / count + slope * (places - first - half)).tolist())


def spread(places: Sequence[float], gap: float) -> list[float]:
    """`places` moved apart to at least `gap`, order kept: what is too close spreads around its middle."""
    groups: list[list[int]] = []

    def edge(group: list[int], side: int) -> float:
        return statistics.fmean(places[i] for i in group) + side * gap * (len(group) - 1) / 2

    for i in sorted(range(len(places)), key=lambda i: places[i]):
        groups.append([i])
        while len(groups) > 1 and edge(groups[-1], -1) - edge(groups[-2], 1) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [edge(g, -1) + gap * g.index(i) for i in range(len(places)) for g in groups if i in g]


def _loss_panel(axes: Any, lines: Sequence[_Line]) -> None:
    axes.set_title("Training loss")
    axes.set_ylabel("nats per token")
    if not any(line.curves.train for line in lines):
        return _say(axes, "no step logged")
    for line in lines:
        train = line.curves.train
        raw = [r["train/loss"] for r in train]
        if len(raw) <= FEW_POINTS:
            line.plot(axes, train, raw)
            continue
        line.plot(axes, train, raw, alpha=0.25, linewidth=0.8, linestyle="-", label="logged steps")
        line.plot(axes, train, smooth(raw, max(8, len(raw) // 30)), label="smoothed")
        if line.alone:
            axes.legend(loc="upper right")
    losses = [r["train/loss"] for line in lines for r in line.curves.train]
    if min(losses) > 0 and max(losses) > 1.5 * min(losses):
        _plain_log(axes)


def _bpb_panel(axes: Any, lines: Sequence[_Line]) -> None:
    axes.set_title("Held-out text")
    axes.set_ylabel("bits per byte")
    shown = [line for line in lines if line.curves.val]
    if not shown:
        return _say(axes, "not measured")
    labels: list[tuple[float, str, str]] = []
    for line in shown:
        during, last = line.curves.val, line.curves.val[-1]
        other_text = len(during) > 1 and last["val/bytes"] != during[-2]["val/bytes"]
        if other_text:  # the last value does not continue the curve
            during = during[:-1]
        size = {"label": f"during training, {short(during[-1]['val/bytes'])}B"}
        line.plot(axes, during, [r["val/bpb"] for r in during], **size)
        if other_text:
            size = {"label": f"at the end, {short(last['val/bytes'])}B"}
            line.plot(axes, [last], [last["val/bpb"]], marker="D", markersize=6, linestyle="", **size)
        if other_text and line.alone:
            axes.legend(loc="best")
        labels.append((last["val/bpb"], f"model: {last['val/bpb']:.3f}", line.color))
    texts = {tuple(line.curves.compressors.items()) for line in shown if line.curves.compressors}
    if len(texts) == 1:  # the same held-out text: else each line would belong to one run only
        for name, value in texts.pop():
            axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            labels.append((value, f"{name}: {value:.3f}", GREY))
    everything = [value for value, _, _ in labels] + [r["val/bpb"] for line in shown for r in line.curves.val]
    everything = [value for value in everything if isfinite(value)]
    if not everything:
        return _say(axes, "nothing measured is a number")
    low, high = min(everything), max(everything)
    axes.set_ylim(low - 0.06 * (high - low or low), high + 0.06 * (high - low or low))
    _label_right(axes, [label for label in labels if isfinite(label[0])])


def _schedule_panels(rate: Any, norm: Any, lines: Sequence[_Line]) -> None:
    rate.set_title("Learning rate and gradient norm")
    rate.set_ylabel("learning rate")
    norm.set_ylabel("gradient norm")
    if not any(line.curves.train for line in lines):
        _say(rate, "no step logged")
        return _say(norm, "no step logged")
    for line in lines:
        train = line.curves.train
        line.plot(rate, train, [r["optim/lr"] for r in train])
        line.plot(norm, train, [r["optim/grad_norm"] for r in train], linewidth=0.9)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: scientific(value))
    logged = [r["optim/grad_norm"] for line in lines for r in line.curves.train]
    norms = [value for value in logged if isfinite(value)]
    if norms and min(norms) > 0 and max(norms) > 10 * min(norms):
        norm.set_yscale("log")
    elif norms:
        norm.set_ylim(0, 1.1 * max(norms) or 1)


def _speed_panel(axes: Any, lines: Sequence[_Line]) -> None:
    axes.set_title("Speed of the whole job")
    axes.set_ylabel("tokens per second")
    shown = [line for line in lines if line.curves.train]
    if not shown:
        return _say(axes, "no step logged")
    labels = []
    for line in shown:
        rates = [r["perf/tokens_per_second"] for r in line.curves.train]
        line.plot(axes, line.curves.train, rates, linewidth=1.1)
        middle = median_after_first(rates)
        labels.append((middle, f"median: {short(middle)}", GREY if line.alone else line.color))
        if line.alone:
            axes.axhline(middle, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    _label_right(axes, labels)


def median_after_first(values: Sequence[float]) -> float:
    """Median without the first window, which holds the warm-up of caches and compilers; its own if alone."""
    return statistics.median(values[1:] or values)


def short(value: float) -> str:
    """Three significant digits with k, M or G: 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """Two digits at most: 2.5e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _label_right(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names beside the right end of the lines they belong to, moved apart where they would touch."""
    low, high = axes.get_ylim()
    places = spread([value for value, _, _ in labels], 0.065 * (high - low))
    for (_, text, color), place in zip(labels, places, strict=True):
        axes.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8.5,
            annotation_clip=False,
        )


def _plain_log(axes: Any) -> None:
    """A logarithmic axis with plain numbers: the fall of the first steps does not flatten the rest."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _key(line: _Line) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=line.color, linestyle=line.style, linewidth=1.8, label=line.curves.name)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
