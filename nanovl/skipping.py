"""Steps without a finite loss or gradient norm leave the weights alone; too many in a row end the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from nanovl.errors import TrainingError
from nanovl.log import Log
from nanovl.optim.gradients import nonfinite_gradients
from nanovl.optim.groups import shorten
from nanovl.run import Run, write_json
from nanovl.step import StepResult


class SkippedSteps:
    """Counts them."""

    def __init__(self, limit: int, run: Run, log: Log, *, main: bool) -> None:
        self.limit, self.run, self.log, self.main = limit, run, log, main
        self.count = self.in_a_row = 0

    @property
    def dump(self) -> Path:
        """Where the parameters at fault are written when the run ends."""
        return self.run.folder / "nonfinite.json"

    def add(self, step: int, result: StepResult, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Count `step` if it was one, and say so. Raises TrainingError for more than `limit` in a row."""
        if result.finite:
            self.in_a_row = 0
            return
        self.count += 1
        self.in_a_row += 1
        names = nonfinite_gradients(parameters)
        found = f"loss {result.loss}, gradient norm {result.grad_norm}"
        at_fault = f"; not finite: {shorten(names)}" if names else ""
        self.log.warn(f"step {step}: {found}: skipped on all ranks, weights unchanged{at_fault}")
        if self.in_a_row > self.limit:
            if self.main:
                write_json(self.dump, {"step": step, "gradients": names})
            raise TrainingError(
                f"step {step}: {self.in_a_row} steps in a row without finite loss and gradients ({found}); the "
                f"parameters at fault are in {self.dump}. Resume from {self.run.checkpoints} with a lower "
                "optimizer.lr or training.max_norm"
            )
