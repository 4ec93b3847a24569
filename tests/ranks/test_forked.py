"""What forked ranks inherit from the process that forks them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from nanovl.dist import fork_ranks


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def collect(rank: int) -> int:
    gc.collect()
    return rank


@pytest.mark.usefixtures("no_collection")
def test_a_group_that_is_garbage_at_the_fork_is_not_destroyed_in_it() -> None:
    cycle: list[Any] = [ProcessGroupGloo(HashStore(), 0, 1, torch.distributed.default_pg_timeout)]
    cycle.append(cycle)
    del cycle
    assert fork_ranks(collect, 1, timeout_seconds=30) == [0]
