"""Real processes, killed for real: what was saved is whole, what was being written is not used, signals save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nanovl.checkpoint.manager import committed
from nanovl.inference.load import load
from nanovl.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def start(folder: Path, flags: Sequence[str], *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nanovl", "train", "--config", str(ROOT / "configs" / "debug.toml")]
    return subprocess.Popen(
        [*command, *flags, f"--job.run_dir={folder}", *extra],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: object, process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {what} in 120 s"
        time.sleep(0.005)


def test_killed_while_saving_the_previous_checkpoint_loads_and_the_run_goes_on(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    folder = tmp_path / "run"
    flags = [*tiny_flags, "--training.steps=400", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=3"]
    process = start(folder, flags)
    saving = folder / "checkpoints"
    wait_until(lambda: len(committed(saving)) >= 2 and list(saving.glob("*.tmp")), process, "save under way")
    process.kill()
    process.wait()
    newest = committed(saving)[-1]
    step = int(newest.name.removeprefix("step_"))
    load(newest, device="cpu")
    again = start(folder, [*flags, f"--training.steps={step + 2}"], "--resume")
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert f"(step {step})" in output
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == list(range(1, step + 3))
    assert not list(saving.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75_and_the_run_goes_on_bit_equal(
    tmp_path: Path, tiny_flags: list[str], number: signal.Signals
) -> None:
    flags = [*tiny_flags, "--training.steps=40", "--lr_schedule.kind=constant"]
    process = start(tmp_path / "stopped", flags)
    wait_until(lambda: len(read_metrics(tmp_path / "stopped" / "metrics.jsonl")) >= 3, process, "third step")
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert f"stopped by {number.name}" in output
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["sessions"][-1][
        "exit_reason"
    ].startswith("stopped")
    assert (tmp_path / "stopped" / "report.md").exists()
    resumed, whole = start(tmp_path / "stopped", flags, "--resume"), start(tmp_path / "whole", flags)
    for process in (resumed, whole):
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
    stopped_losses, losses = (
        [r["train/loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("stopped", "whole")
    )
    assert stopped_losses == losses
    a, b = (load(tmp_path / name, device="cpu").model for name in ("stopped", "whole"))
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def test_a_vanished_file_stops_a_resumed_run(tmp_path: Path, tiny_flags: list[str], corpus: Path) -> None:
    copy = tmp_path / "corpus"
    copy.mkdir()
    for file in corpus.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    flags = [f.replace(str(corpus), str(copy)) for f in tiny_flags]
    first = start(tmp_path / "run", [*flags, "--training.steps=2"])
    assert first.wait(timeout=120) == 0, first.communicate()[0]
    gone = sorted(copy.iterdir())[5]
    gone.unlink()
    again = start(tmp_path / "run", [*flags, "--training.steps=4"], "--resume")
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 1, output
    assert f"{gone.name} is gone since the checkpoint was written" in output
    assert len(committed(tmp_path / "run" / "checkpoints")) == 1
