"""A collective that a peer never joins fails in the time that was set, and every rank leaves its stacks."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch.distributed import ProcessGroup

from nanovl import build, dist, hang, trainer
from nanovl.checkpoint.manager import Checkpointer
from nanovl.config.schema import Job
from nanovl.dist import RankFailed, fork_ranks
from nanovl.errors import NanovlError
from nanovl.hang import HangWatch, record_collectives
from nanovl.registry import read_job

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
MISSED = 10_007
"""Numbers in the collective that a rank misses."""


def seconds_alone(group: ProcessGroup | None) -> float:
    """How long this rank waits for others that never come."""
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out"):
        torch_dist.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - began


def wait_in_groups(rank: int) -> list[float]:
    changed, kept = torch_dist.new_group(), torch_dist.new_group()
    dist.set_timeout(2.0, keep=[torch_dist.group.WORLD])
    time.sleep(rank)
    torch_dist.all_reduce(torch.ones(1), group=changed)  # a second late is in time
    dist.set_timeout(0.5, keep=[kept, torch_dist.group.WORLD])
    waited = [seconds_alone(changed), seconds_alone(kept)] if rank == 0 else []
    return waited


def test_every_group_gets_the_new_limit_but_those_that_keep_theirs() -> None:
    (changed, kept), _ = fork_ranks(wait_in_groups, 2)
    assert 0.4 < changed < 1.5
    assert 1.9 < kept < 3.0


def wait_in_the_world(rank: int) -> None:
    dist.set_timeout(0.5)
    if rank == 0:
        raise NanovlError(f"waited {seconds_alone(None):.0f}.5 s")
    time.sleep(2)


def test_the_group_of_all_ranks_gets_it_too() -> None:
    with pytest.raises(RankFailed, match=r"waited [01]\.5 s"):
        fork_ranks(wait_in_the_world, 2)


def deep_in_a_loader(folder: Path, rank: int) -> None:
    """Never reach the collective; here until both files of this rank are written."""
    stacks, deadline = folder / f"hang_rank_{rank}.txt", time.monotonic() + 20
    while not (
        stacks.exists()
        and "deep_in_a_loader" in stacks.read_text()
        and (folder / f"comm_rank_{rank}").exists()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stick(rank: int, folder: Path) -> None:
    hang.NEWS_SECONDS = 0.2
    record_collectives(folder, 100)
    watch = HangWatch(folder, rank, 3)
    torch_dist.all_reduce(torch.ones(3))
    watch.step = 7
    dist.set_timeout(1.0)
    try:
        if rank == 2:
            deep_in_a_loader(folder, 2)
        torch_dist.all_reduce(torch.ones(MISSED))
    except RuntimeError as error:
        explained = watch.explain(error)
        assert explained is not None
        raise explained from error
    finally:
        watch.close()


def test_a_hang_leaves_stacks_and_collectives_of_every_rank(tmp_path: Path) -> None:
    # from a fresh process: a fork's records begin with those of the tests before this one
    launched = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, check=False
    )
    assert re.search(
        r"NanovlError: rank [01] \(.+\) waited in vain for another rank after step 7", launched.stderr
    )
    stacks = [(tmp_path / f"hang_rank_{rank}.txt").read_text() for rank in range(3)]
    for rank, text in enumerate(stacks):
        assert f"this is rank {rank} (" in text
        assert "7 steps done" in text
    assert "all_reduce" in stacks[0] + stacks[1]
    assert "in deep_in_a_loader" in stacks[2]
    recorded = [pickle.loads((tmp_path / f"comm_rank_{rank}").read_bytes()) for rank in range(3)]
    missed = [not any(e["input_sizes"] == [[MISSED]] for e in trace["entries"]) for trace in recorded]
    assert missed == [False, False, True]
    if torch.__version__ >= "2.13":  # 2.11's torchfrtrace reads nccl's only
        compare = [Path(sys.executable).with_name("torchfrtrace"), "--prefix", "comm_rank_", tmp_path]
        found = subprocess.run(compare, capture_output=True, text=True, check=True)
        assert "missing ranks: {2}" in found.stderr
        assert f"input sizes: [[{MISSED}]]" in found.stderr


def stick_in_training(rank: int, job: Job) -> None:
    """Rank 1 never takes its third step."""
    hang.NEWS_SECONDS = 0.2
    sound, taken = trainer.train_step, []

    def train_step(*args: Any, **kwargs: Any) -> Any:
        if rank == 1 and len(taken) == 2:
            deep_in_a_loader(Path(job.job.run_dir) / "traces", 1)
            raise RuntimeError("left by peer")
        taken.append(rank)
        return sound(*args, **kwargs)

    trainer.train_step = train_step
    trainer.train(job)


def test_a_training_run_that_hangs_says_so_and_leaves_a_file_per_rank(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    flags = [
        *tiny_flags,
        "--training.steps=5",
        "--comm.train_timeout_seconds=2",
        "--checkpoint.interval=1",  # the limit is short again behind every save
        f"--job.run_dir={tmp_path}/run",
    ]
    job = read_job([CONFIG], flags, world_size=2)
    with pytest.raises(RankFailed, match=r"rank 0 \(.+\) waited in vain for another rank after step 2"):
        fork_ranks(stick_in_training, 2, job)
    traces = tmp_path / "run" / "traces"
    assert sorted(f.name for f in traces.iterdir()) == [
        "comm_rank_0", "comm_rank_1", "hang_rank_0.txt", "hang_rank_1.txt",
    ]  # fmt: skip
    assert "in deep_in_a_loader" in (traces / "hang_rank_1.txt").read_text()
    assert "2 steps done" in (traces / "hang_rank_1.txt").read_text()
    session = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"][-1]
    assert session["exit_reason"].startswith("failed: rank 0")
    assert "ranks     2 ranks on 1 machine agree" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()


def slow(seconds: float, work: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return work(*args, **kwargs)

    return run


def be_slow_outside_of_steps(rank: int, job: Job) -> None:
    """Each rank in turn is slower than the limits of start and training."""
    if rank == 0:
        build.train_tokenizer = slow(6.0, build.train_tokenizer)
        trainer.compressor_bpb = slow(3.0, trainer.compressor_bpb)
    else:
        Checkpointer.save = slow(3.0, Checkpointer.save)  # type: ignore[method-assign]
    trainer.train(job)


def test_saving_evaluating_and_training_a_tokenizer_may_take_longer_than_a_step(
    tmp_path: Path, tiny_flags: list[str]
) -> None:
    flags = [
        *tiny_flags,
        "--tokenizer.path=",
        "--tokenizer.trainer=tokenizers",  # the other's threads are lost in a fork
        "--tokenizer.train_characters=20000",
        "--training.steps=2",
        "--comm.init_timeout_seconds=5",
        "--comm.train_timeout_seconds=2",
        "--validation.freq=1",
        "--validation.final_max_bytes=2000",
        "--validation.max_bytes=2000",
        f"--job.run_dir={tmp_path}/run",
    ]
    fork_ranks(be_slow_outside_of_steps, 2, read_job([CONFIG], flags, world_size=2))
    session = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"][-1]
    assert session["exit_reason"] == "finished"


def test_outside_of_steps_there_is_a_limit_too(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [
        *tiny_flags,
        "--training.steps=1",
        "--comm.outside_timeout_seconds=2",
        f"--job.run_dir={tmp_path}/run",
    ]
    with pytest.raises(RankFailed, match=r"(?s)waited in vain .*after step 1.*comm.outside_timeout_seconds"):
        fork_ranks(never_save, 2, read_job([CONFIG], flags, world_size=2))


def never_save(rank: int, job: Job) -> None:
    hang.NEWS_SECONDS = 0.2
    if rank == 1:
        Checkpointer.save = slow(20.0, Checkpointer.save)  # type: ignore[method-assign]
    trainer.train(job)


def train_rank(rank: int, job: Job) -> None:
    trainer.train(job)


def test_a_training_run_that_ends_well_leaves_none(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [
        *tiny_flags,
        "--training.steps=1",
        "--comm.check_at_start=false",
        f"--job.run_dir={tmp_path}/run",
    ]
    fork_ranks(train_rank, 2, read_job([CONFIG], flags, world_size=2))
    assert list((tmp_path / "run" / "traces").iterdir()) == []
    assert "agree" not in (tmp_path / "run" / "logs" / "rank_0.log").read_text()


def lose(rank: int, folder: Path) -> None:
    watch = HangWatch(folder, rank, 2)
    torch_dist.barrier()
    if rank == 1:
        os._exit(1)
    with pytest.raises(RuntimeError) as lost:
        torch_dist.all_reduce(torch.ones(MISSED))
    (folder / "said.txt").write_text(str(watch.explain(lost.value)))
    watch.close()
    os._exit(1)


def test_a_rank_whose_peer_died_says_so_and_leaves_no_stacks(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="died with exit codes"):
        fork_ranks(lose, 2, tmp_path)
    said = (tmp_path / "said.txt").read_text()
    assert re.match(r"rank 0 \(.+\) lost the connection to another rank after step 0", said)
    assert not (tmp_path / "hang_rank_0.txt").exists()


def test_other_errors_stay_what_they_are_and_one_rank_watches_nothing(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path / "traces", 0, 1)
    error = RuntimeError("[gloo] Timed out")
    assert watch.explain(error) is None
    watch.close()
    assert not (tmp_path / "traces").exists()


def test_the_recorder_is_set_before_the_group_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")
    record_collectives(Path("runs/x/traces"), 20)
    assert [os.environ[name] for name in names] == ["20", "runs/x/traces/comm_rank_", "1"]
    record_collectives(Path("runs/x/traces"), 0)
    assert [os.environ[name] for name in names] == ["0", "runs/x/traces/comm_rank_", "0"]


if __name__ == "__main__":
    fork_ranks(stick, 3, Path(sys.argv[1]))
