"""Metrics of a run: the step line, rates, metrics.jsonl through kills and resumes, TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanovl import metrics as module
from nanovl.errors import RunError
from nanovl.metrics import Meter, Metrics, duration, read_metrics, step_line, truncate_after


def record(step: int, **other: Any) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 3.14159,
        "optim/grad_norm": 0.126,
        "optim/lr": 0.00123,
        "perf/tokens_per_second": 12345.6,
        "perf/data_wait": 0.1,
        "perf/mfu": None,
        "memory/peak_gib": 1.25,
        **other,
    }


def test_step_line_of_a_cpu() -> None:
    assert step_line(record(25), 300, 187.2) == (
        "step    25/300   8.3%  loss 3.1416  norm 0.13  lr 1.2e-03  12,346 tok/s  mem 1.2G  eta 3m07s"
    )


def test_step_line_has_the_loss_of_every_depth() -> None:
    line = step_line(record(25, **{"train/mtp_loss_1": 4.5, "train/mtp_loss_2": 5.25}), 300, 0.0)
    assert "  loss 3.1416  mtp_loss_1 4.5000  mtp_loss_2 5.2500  norm 0.13" in line


def test_step_line_names_utilisation_and_a_slow_loader() -> None:
    line = step_line(record(300, **{"perf/mfu": 0.4567, "perf/data_wait": 0.254}), 300, 0.0)
    assert line == (
        "step   300/300  100.0%  loss 3.1416  norm 0.13  lr 1.2e-03  12,346 tok/s  mfu 45.7%  mem 1.2G  "
        "eta 0s  data wait 25% (slow loader)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (12.4, "12s"),
        (59.6, "1m00s"),
        (187.0, "3m07s"),
        (3599.7, "1h00m"),
        (30_120.0, "8h22m"),
        (360_000.0, "100h00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    """time.perf_counter, set by hand."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_meter_counts_training_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    meter = Meter(steps=10)
    clock.now = 102.0
    meter.step_done(500, 6e9, 0.5)
    meter.pause_clock()
    clock.now = 150.0  # a validation
    meter.resume_clock()
    clock.now = 152.0
    meter.step_done(500, 6e9, 0.5)
    assert meter.read(2) == {
        "tokens_per_second": 250.0,
        "flops_per_second": 3e9,
        "seconds_per_step": 2.0,
        "data_wait": 0.25,
        "eta": 16.0,
    }
    clock.now = 153.0
    meter.step_done(500, 9e9, 0.0)
    assert meter.read(3) == {
        "tokens_per_second": 500.0,
        "flops_per_second": 9e9,
        "seconds_per_step": 1.0,
        "data_wait": 0.0,
        "eta": 7.0,
    }


def test_records_come_back_at_full_precision(tmp_path: Path) -> None:
    written = [{"step": 1, "train/loss": 0.1 + 0.2, "perf/mfu": None}, {"step": 2, "train/loss": 1e-310}]
    metrics = Metrics(tmp_path)
    for one in written:
        metrics.write(one)
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == one  # at once, not when the file is closed
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == written


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(None, tensorboard=True)
    metrics.write(record(1))
    metrics.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rest", ['{"step": 3, "tr', '{"step": 3, "train/loss": 2.5', "{", '"caf\xe9'])
def test_a_last_line_cut_short_is_left_out(tmp_path: Path, rest: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n' + rest.encode("latin-1"))
    assert read_metrics(file) == [{"step": 1}, {"step": 2}]


def test_any_other_broken_line_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 is no JSON: .*; remove that line"):
        read_metrics(file)


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    truncate_after(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_truncate_drops_what_comes_after_the_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "train/loss": step / 3} for step in (1, 10, 10, 20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "tra')
    truncate_after(file, 10)
    assert file.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:3])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics = Metrics(tmp_path)
    metrics.write({"step": 11})
    metrics.close()
    assert [one["step"] for one in read_metrics(file)] == [1, 10, 10, 11]


def test_a_kill_while_truncating_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        truncate_after(file, 1)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value)."""
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.write({"step": 1, "tokens": 64, "train/loss": 2.5, "perf/mfu": None})
    metrics.write({"step": 2, "tokens": 128, "train/loss": 1.25, "perf/mfu": 0.5})
    metrics.write({"step": 2, "tokens": 128, "val/bpb": 1.75, "val/bytes": 1000})
    metrics.close()
    assert scalars(tmp_path) == {
        "train/loss": [(1, 2.5), (2, 1.25)],
        "perf/mfu": [(2, 0.5)],
        "val/bpb": [(2, 1.75)],
        "val/bytes": [(2, 1000.0)],
    }


def test_tensorboard_forgets_what_a_killed_session_did_after_its_checkpoint(tmp_path: Path) -> None:
    first = Metrics(tmp_path, tensorboard=True)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "train/loss": float(step)})
    first.close()
    truncate_after(tmp_path / "metrics.jsonl", 2)
    second = Metrics(tmp_path, tensorboard=True)
    second.write({"step": 3, "train/loss": 30.0})
    second.close()
    assert scalars(tmp_path) == {"train/loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}
    truncate_after(tmp_path / "metrics.jsonl", 0)
    third = Metrics(tmp_path, tensorboard=True)
    third.write({"step": 1, "train/loss": 10.0})
    third.close()
    assert scalars(tmp_path) == {"train/loss": [(1, 10.0)]}
