"""The run folder: everything a run writes, and enough to make it again. It is the noun of every command.

config/  config.json  run.json  git.diff  tokenizer/  checkpoints/
logs/  metrics.jsonl  tb/  evals/  samples.jsonl  report.md  report.png
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nanovl.config.load import job_from_dict, job_to_dict
from nanovl.config.schema import Job
from nanovl.errors import ConfigError, RunError

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
        return os.path.exists(self.config)  # which a path that cannot be is not, either

    def is_of_this_launch(self) -> bool:
        """Whether torchrun or slurm has started this process again to go on with what its own launch began here.

        A run that was here before the launch is not, however often torchrun tries.
        """
        begun = [session.get("launch", {}) for session in self.sessions()[-1:]] if self.is_used() else []
        own = _launch()
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            own.pop("slurm", None)  # the first time, the job may well run several launches
        return any(launch.get(kind) == name for launch in begun for kind, name in own.items())

    def require_fresh(self, resume: bool) -> None:
        """Raises RunError where a fresh run would overwrite one, or a resumed one has nothing to resume."""
        there = os.path.exists(self.folder)
        if there and not self.folder.is_dir():
            raise RunError(f"job.run_dir: {self.folder} is a file; choose a folder with --job.run_dir=...")
        if resume and not self.is_used():
            if self.checkpoints.is_dir():  # converted from elsewhere
                raise RunError(
                    f"--resume: {self.folder} holds weights alone, without a job; begin a run of its own with "
                    f"--checkpoint.initial_load_path={self.folder}"
                )
            raise RunError(f"--resume: {self.folder} holds no run; start it without --resume")
        if not resume and there and any(self.folder.iterdir()):
            state = "is in use; continue it with --resume," if self.is_used() else "holds files but no run;"
            raise RunError(
                f"job.run_dir: {self.folder} {state} remove it, or choose another with --job.run_dir=..."
            )

    def make(self) -> None:
        """Make the folder. Raises ConfigError where nothing can be written to it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"job.run_dir = {str(self.folder)!r}: cannot be written to ({error.strerror}); choose a folder of your "
                "own with --job.run_dir=..."
            ) from None

    def write_job(self, job: Job, files: Sequence[str | Path]) -> None:
        """Keep the job: the files as given, and every field resolved."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "config"
        names = [Path(file).name for file in files]
        for number, (file, name) in enumerate(zip(files, names, strict=True), 1):
            copy = kept / (name if names.count(name) == 1 else f"{number}_{name}")
            # a resumed run may be given the files of its own folder
            if Path(file).resolve() not in (self.config.resolve(), copy.resolve()):
                kept.mkdir(exist_ok=True)
                shutil.copy(file, copy)
        write_json(self.config, job_to_dict(job))

    def read_job(self) -> Job:
        """The resolved job. Raises RunError if this is no run, ConfigError for a job of another version."""
        if not self.is_used():
            raise RunError(
                f"{self.folder} is no run folder: it has no config.json; name one of a training run"
            )
        return job_from_dict(read_json(self.config), str(self.config))

    def begin(self, hardware: str, world_size: int, mesh: str) -> None:
        """Add a session to run.json: command, commit, versions, hardware; and a git.diff if there is one."""
        before = self.sessions()
        sha, dirty, diff = git_state()
        diff_name = f"git.{len(before) + 1}.diff" if before else "git.diff"
        session = {
            "command": _command(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git_sha": sha,
            "git_dirty": dirty,
            "git_diff": diff_name if diff else "",
            "python": sys.version.split()[0],
            "versions": {name: found for name in _PACKAGES if (found := _version(name))},
            "hardware": hardware,
            "world_size": world_size,
            "mesh": mesh,
            "launch": _launch(),
            "exit_reason": "running",
        }
        if diff:
            (self.folder / diff_name).write_bytes(diff)
        write_json(self.folder / "run.json", {"sessions": [*before, session]})

    def note(self, **facts: Any) -> None:
        """Add to the latest session what was decided after it began, such as `param_dtype="bfloat16"`."""
        sessions = self.sessions()
        sessions[-1].update(facts)
        write_json(self.folder / "run.json", {"sessions": sessions})

    def end(self, reason: str) -> None:
        """Say in run.json why the latest session ended."""
        self.note(exit_reason=reason, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def sessions(self) -> list[dict[str, Any]]:
        """One entry for each time the run was started or resumed, oldest first. Raises RunError."""
        file = self.folder / "run.json"
        found: list[dict[str, Any]] = read_json(file)["sessions"] if file.exists() else []
        return found


def write_json(file: Path, value: Any) -> None:
    """Write through a temporary name, so that a kill leaves the old file or the new one."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`. Raises RunError where it cannot be read."""
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSON and UTF-8 errors are both ValueErrors
        raise RunError(f"{file}: cannot be read: {error}; restore it from a copy") from None
    return data


def _launch() -> dict[str, str]:
    """Names of what launched this process, the same for all its restarts."""
    names = {"torchrun": "TORCHELASTIC_RUN_ID", "slurm": "SLURM_JOB_ID"}
    found = {kind: os.environ.get(name, "none") for kind, name in names.items()}
    return {kind: name for kind, name in found.items() if name != "none"}  # what torchrun says for no name


def _command(argv: Sequence[str]) -> str:
    """The command line as a shell takes it; what `python -m nanovl` puts in argv[0] is no program."""
    program = Path(argv[0]).name
    return shlex.join([*(["python", "-m", "nanovl"] if program == "__main__.py" else [program]), *argv[1:]])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def git_state() -> tuple[str, bool, bytes]:
    """Commit, whether the checkout nanovl runs from differs from it, and its diff (new files are not in it).

    Nothing outside of a checkout with a commit.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "", False, b""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, check=True).stdout

    try:
        sha = git("rev-parse", "HEAD").decode().strip()
        return sha, bool(git("status", "--porcelain")), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout without a commit
        return "", False, b""
