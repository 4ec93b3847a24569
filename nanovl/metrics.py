"""Numbers of a run: the step line for people, metrics.jsonl always, TensorBoard on request.

Keys: step, tokens, seconds, train/loss, train/mtp_loss_1 and so on (depths of multi-token prediction),
optim/grad_norm, optim/lr, perf/tokens_per_second (whole job), perf/data_wait (share of time), perf/mfu,
perf/mfu_noncausal, memory/peak_gib, val/bpb, ..., floats in full.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from nanovl.errors import RunError


class Metrics:
    """Writer of metrics.jsonl (and tb/); on ranks other than 0 it writes nothing."""

    def __init__(self, folder: Path | None, tensorboard: bool = False) -> None:
        self.file = None if folder is None else (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.board: Any = None
        if folder is not None and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a killed session wrote after the step this one starts from
            logged = read_metrics(folder / "metrics.jsonl")
            self.board = SummaryWriter(str(folder / "tb"), purge_step=logged[-1]["step"] + 1 if logged else 0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one object; every number with a `/` in its key goes to TensorBoard at `record["step"]`."""
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for key, value in record.items():
                if "/" in key and isinstance(value, int | float):
                    self.board.add_scalar(key, value, record["step"])
            self.board.flush()

    def close(self) -> None:
        """Close the files."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def truncate_after(file: Path, step: int) -> None:
    """Drop what a killed session logged after the checkpoint that a resumed one starts from."""
    if not file.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_metrics(file) if record["step"] <= step]
    draft = file.with_name(file.name + ".tmp")
    draft.write_text("".join(kept), encoding="utf-8")
    os.replace(draft, file)  # a kill leaves the old file or the new one


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All records, oldest first, less a last line that a kill cut short. RunError for another broken one."""
    records: list[dict[str, Any]] = []
    lines = file.read_bytes().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:  # JSON and UTF-8 errors are both ValueErrors
            if number == len(lines):
                break
            raise RunError(f"{file}: line {number} is no JSON: {error}; remove that line") from None
    return records


class Meter:
    """Tokens and seconds since the last log line, without the time of validation, samples and saving."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.tokens = 0
        self.taken = 0
        self.flops = 0.0
        self.busy = 0.0
        self.data_wait = 0.0
        self._since = time.perf_counter()

    def resume_clock(self) -> None:
        """From here on time counts again."""
        self._since = time.perf_counter()

    def pause_clock(self) -> None:
        """Time up to here counts."""
        self.busy += time.perf_counter() - self._since

    def step_done(self, tokens: int, flops: float, data_wait: float) -> None:
        """Count one step: tokens and FLOPs of the whole job, and seconds of it that were spent waiting for data."""
        self.tokens += tokens
        self.flops += flops
        self.taken += 1
        self.data_wait += data_wait

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last call, and seconds to the end of the run; starts the next window."""
        self.pause_clock()
        rates = {
            "tokens_per_second": self.tokens / self.busy,
            "flops_per_second": self.flops / self.busy,
            "seconds_per_step": self.busy / self.taken,
            "data_wait": self.data_wait / self.busy,
            "eta": (self.steps - step) * self.busy / self.taken,
        }
        self.tokens = self.taken = 0
        self.flops = self.busy = self.data_wait = 0.0
        self.resume_clock()
        return rates


def step_line(record: dict[str, Any], steps: int, eta: float) -> str:
    """The line of one logged step; what is unknown (MFU on a CPU) is left out."""
    step = record["step"]
    parts = [
        f"step {step:>5}/{steps}",
        f"{100 * step / steps:4.1f}%",
        f"loss {record['train/loss']:.4f}",
        *(
            f"{key.removeprefix('train/')} {record[key]:.4f}"
            for key in record
            if key.startswith("train/mtp_loss_")
        ),
        f"norm {record['optim/grad_norm']:.2f}",
        f"lr {record['optim/lr']:.1e}",
        f"{record['perf/tokens_per_second']:,.0f} tok/s",
    ]
    if record.get("perf/mfu") is not None:
        parts.append(f"mfu {100 * record['perf/mfu']:.1f}%")
    parts += [f"mem {record['memory/peak_gib']:.1f}G", f"eta {duration(eta)}"]
    if record["perf/data_wait"] > 0.1:
        parts.append(f"data wait {100 * record['perf/data_wait']:.0f}% (slow loader)")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """8h22m, 3m07s, 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 60}m{whole % 60:02}s" if whole >= 60 else f"{whole}s"
