"""run_train.sh as a launcher: one process, two gloo ranks, the shown rank."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "run_train.sh"), *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_two_ranks_on_a_cpu_show_rank_0_and_log_both(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = ["--config", str(ROOT / "configs" / "debug.toml"), *tiny_flags, "--training.steps=2"]
    done = launch(*flags, f"--job.run_dir={tmp_path / 'run'}", NGPU="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step     2/2") == 1
    assert "mesh      2 ranks: dp_shard 2" in done.stdout
    for rank in (0, 1):
        assert "step     2/2" in (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text()
    again = launch(*flags, f"--job.run_dir={tmp_path / 'other'}", NGPU="2", LOG_RANK="1")
    assert again.stdout.count("step     2/2") == 1


def test_a_mistake_is_told_before_any_rank_starts_to_work(tmp_path: Path) -> None:
    done = launch("--config", str(ROOT / "configs" / "debug.toml"), "--training.steps=x", NGPU="1")
    assert done.returncode == 2
    assert "training.steps = 'x' (from flag): wants a whole number" in done.stderr


def test_several_machines_need_a_meeting_point() -> None:
    done = launch("--config", "x.toml", NNODES="2")
    assert done.returncode != 0
    assert "RDZV_ENDPOINT=host:port" in done.stderr
