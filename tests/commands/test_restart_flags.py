"""Which runs a restarted process continues by itself, and the exit code that torchrun would lose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanovl.config.schema import Job
from nanovl.launch import exit_code_kept
from nanovl.run import Run

LAUNCH = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("began", "now", "same"),
    [
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a"}, True),
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "b"}, False),
        ({"TORCHELASTIC_RUN_ID": "a"}, {}, False),
        ({}, {"TORCHELASTIC_RUN_ID": "a"}, False),
        ({}, {}, False),
        # torchrun without --rdzv-id: every launch has this name
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, False),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        # a second launch in one interactive job
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),
        (
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "a"},
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "b", "SLURM_RESTART_COUNT": "2"},
            True,
        ),
    ],
)
def test_a_run_is_continued_by_the_launch_that_began_it_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    began: dict[str, str],
    now: dict[str, str],
    same: bool,
) -> None:
    run = Run(tmp_path)
    assert not run.is_of_this_launch()
    with monkeypatch.context() as then:
        for name, value in began.items():
            then.setenv(name, value)
        run.write_job(Job(), [])
        run.begin("cpu", 1, "1 rank")
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    assert run.is_of_this_launch() is same


def test_a_run_of_another_version_is_of_no_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    Run(tmp_path).write_job(Job(), [])
    (tmp_path / "run.json").write_text(json.dumps({"sessions": [{"command": "nanovl train"}]}))
    assert not Run(tmp_path).is_of_this_launch()


def test_the_exit_code_of_a_stop_is_kept_and_that_of_an_earlier_attempt_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "code"
    monkeypatch.setenv("NANOVL_EXIT_CODE_FILE", str(file))
    with pytest.raises(SystemExit), exit_code_kept():
        raise SystemExit(75)
    assert file.read_text() == "75"
    with pytest.raises(RuntimeError), exit_code_kept():
        raise RuntimeError
    assert not file.exists()
    monkeypatch.delenv("NANOVL_EXIT_CODE_FILE")
    with pytest.raises(SystemExit), exit_code_kept():
        raise SystemExit(75)


def test_train_help_does_without_torch() -> None:
    code = (
        "import sys; from nanovl.launch import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--comm.train_timeout_seconds = 100" in done.stdout
