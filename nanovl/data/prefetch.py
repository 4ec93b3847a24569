"""Making things ahead of their use, in a background thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """What `make` returns, call by call, up to `ahead` calls in advance; with `ahead` = 0 when asked for.

    An exception of `make` comes out of `next` in its turn, and ends the making. The thread ends with `close`,
    with this object, or with the process, and is waited for: one inside native code could crash a process
    that exits.
    """

    def __init__(self, make: Callable[[], T], ahead: int) -> None:
        self._make, self._ahead = make, ahead
        self._made: queue.Queue[T | BaseException] = queue.Queue(maxsize=max(1, ahead))
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._end: Callable[[], object] = self._stop.set
        if ahead:
            thread = threading.Thread(target=_work, args=(make, self._made, self._stop), daemon=True)
            thread.start()
            self._end = weakref.finalize(self, _stop_thread, self._stop, thread)

    def next(self) -> T:
        """The next one. Raises what `make` raised, again at every later call; RuntimeError after `close`."""
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        made = self._made.get() if self._ahead else _outcome(self._make)
        if isinstance(made, BaseException):
            self._failure = made
            raise made
        return made

    def close(self) -> None:
        """End the thread and wait for it; may be called twice."""
        self._end()


def _outcome(make: Callable[[], T]) -> T | BaseException:
    try:
        return make()
    except BaseException as error:  # handed over whole: next() raises it where the trainer waits
        return error


def _work(make: Callable[[], T], made: queue.Queue[T | BaseException], stop: threading.Event) -> None:
    # holds no reference to the Prefetcher, so that one nobody holds any more ends its thread
    while not stop.is_set():
        item = _outcome(make)
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _stop_thread(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
