"""How a run is asked to stop: SIGTERM or Ctrl-C lets it finish its step and save."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

SAME_REQUEST_SECONDS = 2.0  # a terminal or slurm signals every process, and then torchrun its ranks once more


class StopRequest:
    """Entered, it takes the two signals; asked a second time, it raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._asked = 0.0

    @property
    def name(self) -> str:
        """Of the signal that came."""
        return self._signal.name if self._signal else "another rank's signal"

    def __bool__(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self and time.monotonic() - self._asked > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt  # asked twice: now, not after the step
        if not self:
            self._signal, self._asked = signal.Signals(number), time.monotonic()
