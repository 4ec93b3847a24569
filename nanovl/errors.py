"""Errors a user can cause. Each says what happened, where it came from and what to do; bugs of ours are asserts."""

from __future__ import annotations


class NanovlError(Exception):
    """Base of every error that ends a command with a message instead of a traceback; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(NanovlError, ValueError):
    """One or more wrong settings, all listed. Exit code 2, as for a wrong command line."""

    exit_code = 2

    def __init__(self, mistakes: list[str] | str, source: str = "") -> None:
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        head = f"config error in {source}" if source else "config error"
        super().__init__(head + "".join(f"\n  {m}" for m in self.mistakes))


class DataError(NanovlError, ValueError):
    """A file or row that cannot be read as text to train on; the message names it."""


class CheckpointError(NanovlError, ValueError):
    """A checkpoint that is absent, incomplete or does not fit the model; the message lists every key at fault."""


class RunError(NanovlError, RuntimeError):
    """A run folder that cannot be used as asked."""


class TrainingError(NanovlError, RuntimeError):
    """Training cannot go on (non-finite loss, data at its end); what was saved is named."""
