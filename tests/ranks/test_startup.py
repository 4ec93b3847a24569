"""Ranks that do not belong together are named at the start: one odd rank of each kind among real gloo ranks."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import torch

from nanovl import startup
from nanovl.config.schema import Job
from nanovl.dist import RankFailed, fork_ranks
from nanovl.startup import Facts, check_ranks, facts_of

WORLD = 4


def facts(rank: int) -> Facts:
    host = f"node{rank // 2}"
    settings = {"training.steps": "10", "debug.seed": "42", "optimizer.lr": "0.001", "training.seq_len": "64"}
    return Facts(host, "abc" if rank % 2 == 0 else None, "1.0", "2.13.0", settings)


def check(rank: int, odd: dict[int, dict[str, object]], seconds_ahead: dict[int, float], broken: int) -> str:
    """`odd` replaces facts of a rank, `seconds_ahead` sets its clock, `broken` is a rank that adds up wrongly."""
    if rank == broken:
        sound = startup._share
        startup._share = lambda owner_N, rank: sound(owner_N, rank) * 1.5
    return check_ranks(
        replace(facts(rank), **odd.get(rank, {})),
        torch.device("cpu"),
        max_clock_skew_seconds=5.0,
        clock=lambda: time.time() + seconds_ahead.get(rank, 0.0),
    )


def test_ranks_that_agree_get_one_line_with_bandwidth_and_clocks() -> None:
    lines = fork_ranks(check, WORLD, {}, {2: 1.0}, -1)
    assert len(set(lines)) == 1
    assert re.fullmatch(
        r"4 ranks on 2 machines agree; all-reduce of 2 MiB at [\d.e+-]+ GB/s, clocks within [\d.]+ s",
        lines[0],
    ), lines[0]


SETTINGS = facts(0).settings


@pytest.mark.parametrize(
    ("odd", "seconds_ahead", "broken", "expected"),
    [
        (
            {2: {"commit": "def"}},
            {},
            -1,
            "commit: rank 2 (node1): def, where the others have abc; check out the same commit on every machine",
        ),
        (
            {3: {"torch": "2.11.0"}},
            {},
            -1,
            "torch: rank 3 (node1): 2.11.0, where the others have 2.13.0; install the same version",
        ),
        ({0: {"nanovl": "0.9"}}, {}, -1, "nanovl: rank 0 (node0): 0.9, where the others have 1.0; install"),
        (
            {1: {"settings": {**SETTINGS, "training.steps": "20"}}},
            {},
            -1,
            "training.steps: rank 1 (node0): 20, where the others have 10; start every rank with the same --config",
        ),
        (
            {1: {"settings": dict.fromkeys(SETTINGS, "7")}},
            {},
            -1,
            "... and 1 more settings",
        ),
        (
            {},
            {3: 60.0},
            -1,
            "clock: rank 3 (node1): 60 s ahead of the others; synchronise it (NTP), or set "
            "comm.max_clock_skew_seconds above 5",
        ),
        ({}, {0: -60.0}, -1, "clock: rank 0 (node0): 60 s behind the others"),
        ({}, {}, 2, "all-reduce: rank 2 (node1): a sum of known numbers came out wrong; test the memory, GPU"),
    ],
    ids=["commit", "torch", "nanovl", "setting", "settings", "ahead", "behind", "sum"],
)  # fmt: skip
def test_the_odd_rank_is_named(
    odd: dict[int, dict[str, object]], seconds_ahead: dict[int, float], broken: int, expected: str
) -> None:
    with pytest.raises(RankFailed) as failed:
        fork_ranks(check, WORLD, odd, seconds_ahead, broken)
    message = re.sub(r"\b(59|6\d)\.\d s", "60 s", str(failed.value))  # ranks leave a barrier one by one
    assert "NanovlError: the ranks of this job do not belong together\n  " in message
    assert expected in message
    named = set(re.findall(r"rank (\d) \(node", message))
    assert named == {str(rank) for rank in {*odd, *seconds_ahead, *({broken} - {-1})}}


def test_a_rank_that_receives_wrong_sums_is_the_odd_one_and_not_all_the_senders() -> None:
    hosts = [f"node{r}" for r in range(4)]
    assert "rank 3 (node3): a sum" in startup._wrong_sums([[], [], [], [0, 1, 2, 3]], hosts)[0]
    assert "rank 1 (node1): a sum" in startup._wrong_sums([[1], [1], [1], [1]], hosts)[0]
    assert startup._wrong_sums([[], [], [], []], hosts) == []


def test_facts_hold_every_setting_but_the_run_folder() -> None:
    job = Job()
    job.model.overrides = {"depth": 4}
    here = facts_of(job, "1.0", local_rank=0)
    assert here.settings["model.depth"] == "4"
    assert here.settings["training.seq_len"] == "2048"
    assert here.settings["data.sources"] == "[]"
    assert "job.run_dir" not in here.settings
    assert here.commit is not None
    assert facts_of(job, "1.0", local_rank=1).commit is None
