"""Ranks that die, come back, or come back in another number: the job restarts by itself and learns the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nanovl.config.schema import Job
from nanovl.dist import fork_ranks
from nanovl.metrics import read_metrics
from nanovl.registry import read_job
from nanovl.trainer import train

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "debug.toml"
SLURM_SCRIPT = "configs/launch/slurm.sh"
STEPS = 12
MINE = [f"--training.steps={STEPS}", "--checkpoint.interval=3", "--training.local_batch_size=1"]


def launch(
    folder: Path, flags: Sequence[str], *extra: str, script: str = "run_train.sh", **env: str
) -> subprocess.Popen[str]:
    """run_train.sh on debug.toml."""
    return subprocess.Popen(
        [str(ROOT / script), "--config", str(CONFIG), *flags, *MINE, f"--job.run_dir={folder}", *extra],
        env={**os.environ, "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": "lo", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_forked(folder: Path, flags: Sequence[str], world: int, *, resume: bool = False) -> None:
    """The same job without launchers, which take seconds to start."""
    job = read_job([CONFIG], [*flags, *MINE, f"--job.run_dir={folder}"], world_size=world)
    fork_ranks(train_rank, world, job, resume)


def train_rank(rank: int, job: Job, resume: bool) -> None:
    train(job, resume=resume)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=200)[0]
    assert process.returncode == code, output
    return output


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] >= step]:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step} in 120 s"
        time.sleep(0.005)


def worker(folder: Path, rank: int) -> int:
    """Process id of a rank of the run in `folder`."""
    for proc in Path("/proc").iterdir():
        try:
            command, environment = (proc / "cmdline").read_bytes(), (proc / "environ").read_bytes()
        except OSError:  # ended, or not a process
            continue
        if f"--job.run_dir={folder}".encode() in command and f"\0RANK={rank}\0".encode() in environment:
            return int(proc.name)
    raise AssertionError(f"no rank {rank} runs in {folder}")


def losses(folder: Path) -> list[float]:
    """By step; every step is there once."""
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    return [r["train/loss"] for r in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train_forked(folder, tiny_flags, 1)
    return losses(folder)


def test_a_killed_rank_is_replaced_and_the_run_goes_on_from_the_newest_checkpoint(
    tmp_path: Path, tiny_flags: list[str], undisturbed: list[float]
) -> None:
    folder = tmp_path / "run"
    process = launch(folder, tiny_flags, NGPU="4", MAX_RESTARTS="2")
    wait_for_step(folder, 5, process)
    os.kill(worker(folder, 2), signal.SIGKILL)
    output = finish(process)
    assert "lost the connection to another rank after step" in output
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-5)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0]["launch"] == sessions[1]["launch"]
    assert sessions[1]["exit_reason"] == "finished"


SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$STAND_INS/requeued"; fi',
    "srun": 'shift; echo $$ >>"$STAND_INS/processes"; exec "$@"',
    "scancel": '[ "$*" = "--signal=TERM 417" ] && kill -TERM $(cat "$STAND_INS/processes")',
}
"""What slurm.sh asks of slurm, for a job of one machine; there is no slurm to test with."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("slurm")
    for name, body in SLURM.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STAND_INS": str(folder),
        "SLURM_JOB_ID": "417",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MAX_RESTARTS": "0",
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str], slurm: dict[str, str]) -> Path:
    """A run of two ranks whose slurm job was told to end; torchrun signals the ranks once more."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    process = launch(folder, tiny_flags, script=SLURM_SCRIPT, NGPU="2", **slurm)
    wait_for_step(folder, 3, process)
    with (Path(slurm["STAND_INS"]) / "processes").open("a") as processes:
        processes.write(f"{worker(folder, 0)} {worker(folder, 1)}\n")
    process.send_signal(signal.SIGUSR1)
    assert "stopped by SIGTERM after step" in finish(process, code=75)  # torchrun itself says 1
    return folder


def test_a_slurm_job_that_was_told_to_end_is_queued_again_and_goes_on_by_itself_on_fewer_ranks(
    stopped: Path, tmp_path: Path, tiny_flags: list[str], undisturbed: list[float], slurm: dict[str, str]
) -> None:
    requeued = Path(slurm["STAND_INS"]) / "requeued"
    assert requeued.read_text() == "requeue 417\n"
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    finish(launch(folder, tiny_flags, script=SLURM_SCRIPT, NGPU="1", SLURM_RESTART_COUNT="1", **slurm))
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-5)
    assert requeued.read_text() == "requeue 417\n"


def test_a_run_of_two_ranks_goes_on_with_four(
    stopped: Path, tmp_path: Path, tiny_flags: list[str], undisturbed: list[float]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    train_forked(folder, tiny_flags, 4, resume=True)
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-5)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert [s["world_size"] for s in sessions] == [2, 4]


def test_a_run_that_was_there_before_is_not_continued_however_often_torchrun_tries(
    stopped: Path, tiny_flags: list[str]
) -> None:
    output = finish(launch(stopped, tiny_flags, NGPU="1", MAX_RESTARTS="1"), code=1)
    assert output.count("is in use; continue it with --resume") == 2


@pytest.mark.slow
def test_two_machines_lose_a_rank_and_go_on(
    tmp_path: Path, tiny_flags: list[str], undisturbed: list[float]
) -> None:
    """Two launchers of two ranks meet on this machine; the death of a rank restarts those of both."""
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        "NGPU": "2",
        "NNODES": "2",
        "MAX_RESTARTS": "2",
        "RDZV_ENDPOINT": f"localhost:{port}",
        "RDZV_ID": tmp_path.name,
    }
    machines = [launch(folder, tiny_flags, NODE_RANK=str(n), **env) for n in range(2)]
    wait_for_step(folder, 5, machines[0])
    os.kill(worker(folder, 3), signal.SIGKILL)
    for machine in machines:
        finish(machine)
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-5)
