"""torch.profiler traces of some steps, as `[profiling]` asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovl.config.schema import Profiling


class Profiler:
    """Writes `traces/rank_R_step_N.json` (Chrome trace format) every `profile_freq` steps; nothing when not enabled."""

    def __init__(self, config: Profiling, folder: Path, rank: int) -> None:
        self.profile: Any = None
        if not config.enable_profiling:
            return
        import torch.profiler as profiler

        folder.mkdir(parents=True, exist_ok=True)
        wait = max(0, config.profile_freq - config.profiler_warmup - config.profiler_active)

        def write(profile: Any) -> None:
            profile.export_chrome_trace(str(folder / f"rank_{rank}_step_{profile.step_num}.json"))

        self.profile = profiler.profile(
            schedule=profiler.schedule(
                wait=wait, warmup=config.profiler_warmup, active=config.profiler_active
            ),
            on_trace_ready=write,
            record_shapes=True,
        )
        self.profile.start()

    def step_done(self) -> None:
        """Count one step."""
        if self.profile is not None:
            self.profile.step()

    def close(self) -> None:
        """Write what is left."""
        if self.profile is not None:
            self.profile.stop()
