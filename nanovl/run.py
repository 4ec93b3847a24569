"""The run folder: everything a run writes, and enough to make it again. It is the noun of every command.

    config/  config.json  run.json  git.diff  metrics.jsonl  logs/  samples.jsonl  evals/  checkpoints/  tb/  report.md
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nanovl.config.load import job_from_dict, job_to_dict
from nanovl.config.schema import Job
from nanovl.errors import RunError

_PACKAGES = ("nanovl", "torch", "torchtitan", "tokenizers", "tiktoken", "rustbpe", "pyarrow", "numpy")


@dataclass(frozen=True)
class Run:
    """Paths inside one run folder."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    def is_used(self) -> bool:
        """Whether a run has started here."""
        return self.config.exists()

    def require_fresh(self, resume: bool) -> None:
        """Raises RunError where a fresh run would overwrite one, or a resumed one has nothing to resume."""
        if resume and not self.is_used():
            raise RunError(f"--resume: {self.folder} holds no run; start it without --resume")
        if not resume and self.folder.exists() and any(self.folder.iterdir()):
            raise RunError(
                f"job.run_dir: {self.folder} is in use; continue it with --resume, "
                "remove it, or choose another with --job.run_dir=..."
            )

    def write_job(self, job: Job, files: Sequence[str | Path]) -> None:
        """Keep the job: the files as given, and every field resolved."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "config"
        for file in files:
            if Path(file).resolve() != self.config.resolve():
                kept.mkdir(exist_ok=True)
                shutil.copy(file, kept)
        write_json(self.config, job_to_dict(job))

    def read_job(self) -> Job:
        """The resolved job. Raises RunError where the folder is no run."""
        if not self.is_used():
            raise RunError(f"{self.folder} is no run folder: it has no config.json")
        return job_from_dict(json.loads(self.config.read_text(encoding="utf-8")), str(self.config))

    def begin(self, hardware: str, world_size: int, mesh: str) -> None:
        """Add one session to run.json: command, commit, versions, hardware; and git.diff where the checkout is dirty."""
        sha, diff = _git()
        session = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git_sha": sha,
            "git_dirty": bool(diff),
            "python": sys.version.split()[0],
            "versions": {name: found for name in _PACKAGES if (found := _version(name))},
            "hardware": hardware,
            "world_size": world_size,
            "mesh": mesh,
            "exit_reason": "running",
        }
        if diff:
            (self.folder / "git.diff").write_text(diff, encoding="utf-8")
        write_json(self.folder / "run.json", {"sessions": [*self.sessions(), session]})

    def end(self, reason: str) -> None:
        """Say in run.json why the latest session ended."""
        sessions = self.sessions()
        sessions[-1].update(exit_reason=reason, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        write_json(self.folder / "run.json", {"sessions": sessions})

    def sessions(self) -> list[dict[str, Any]]:
        """One entry for each time the run was started or resumed, oldest first."""
        file = self.folder / "run.json"
        if not file.exists():
            return []
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["sessions"]
        return found


def write_json(file: Path, value: Any) -> None:
    """Write through a temporary name, so that a kill leaves the old file or the new one."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, file)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git() -> tuple[str, str]:
    """Commit and uncommitted changes of the checkout nanovl runs from; empty strings outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "", ""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        diff = subprocess.run(["git", "diff", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout without a commit
        return "", ""
    return sha.stdout.strip(), diff.stdout
