"""A function in a process of its own, for what leaves a process in no state to do it again."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def each_in_a_process(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    """`function` of every argument, each in a fork of this process, as many at once as there are cores.

    Arguments need no pickling. Raises RuntimeError with the traceback of the first that failed.
    """
    context, results = multiprocessing.get_context("fork"), []
    at_once = os.cpu_count() or 1
    for start in range(0, len(arguments), at_once):
        running = []
        for argument in arguments[start : start + at_once]:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(sender, function, argument))
            process.start()
            sender.close()  # the child's alone, so that its death is noticed here
            running.append((process, receiver))
        for process, receiver in running:
            results.append(_received(process, receiver))
    return results


def _send(sender: Any, function: Callable[[Any], Any], argument: Any) -> None:
    try:
        sender.send((True, function(argument)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def _received(process: Any, receiver: Any) -> Any:
    try:
        worked, value = receiver.recv()
    except EOFError:
        process.join()
        worked, value = False, f"a process ended with exit code {process.exitcode}"
    process.join()
    if not worked:
        raise RuntimeError(value)
    return value
