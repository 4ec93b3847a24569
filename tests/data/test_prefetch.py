from __future__ import annotations

import gc
import itertools
import threading
import time

import pytest

from nanovl.data.prefetch import Prefetcher
from nanovl.errors import DataError


def wait_until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def failing_at(number: int):
    counter = itertools.count()

    def make() -> int:
        if (value := next(counter)) == number:
            raise DataError("row 3 is broken")
        return value

    return make


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_everything_comes_in_order(ahead):
    steps = Prefetcher(itertools.count().__next__, ahead)
    assert [steps.next() for _ in range(20)] == list(range(20))
    steps.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_exception_comes_in_its_turn_and_again(ahead):
    steps = Prefetcher(failing_at(3), ahead)
    assert [steps.next() for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(DataError, match=r"^row 3 is broken$"):
            steps.next()
    steps.close()


def test_makes_no_more_than_asked_for_ahead():
    made = []
    steps = Prefetcher(lambda: made.append(0), 2)
    assert wait_until(lambda: len(made) == 3)  # two that wait, and one in hand
    time.sleep(0.05)
    assert len(made) == 3
    steps.close()


def test_close_ends_the_thread_and_may_be_called_twice():
    before = threading.active_count()
    steps = Prefetcher(itertools.count().__next__, 1)
    assert threading.active_count() == before + 1
    steps.close()
    steps.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match=r"the loader is closed"):
        steps.next()


def test_a_closed_one_without_a_thread_gives_nothing():
    steps = Prefetcher(itertools.count().__next__, 0)
    steps.close()
    with pytest.raises(RuntimeError, match=r"the loader is closed"):
        steps.next()


def test_the_thread_ends_with_an_object_nobody_holds():
    before = threading.active_count()
    steps = Prefetcher(itertools.count().__next__, 1)
    steps.next()
    del steps
    gc.collect()
    assert wait_until(lambda: threading.active_count() == before)
