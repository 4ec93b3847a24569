"""The run folder: refusals, the job kept in it, sessions, the checkout, files that survive a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanovl import run as module
from nanovl.config.schema import Job, Model, OptimizerGroup, Source
from nanovl.errors import ConfigError, RunError
from nanovl.run import Run, read_json, write_json


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "x")


def test_a_new_or_empty_folder_is_fresh(run: Run) -> None:
    run.require_fresh(resume=False)
    run.folder.mkdir(parents=True)
    run.require_fresh(resume=False)
    assert not run.is_used()


def test_a_used_folder_is_refused_unless_resumed(run: Run) -> None:
    run.write_job(Job(), [])
    assert run.is_used()
    run.require_fresh(resume=True)
    wanted = (
        f"job.run_dir: {run.folder} is in use; continue it with --resume, remove it, "
        "or choose another with --job.run_dir=..."
    )
    with pytest.raises(RunError, match=f"^{re.escape(wanted)}$"):
        run.require_fresh(resume=False)


def test_there_must_be_a_run_to_resume(run: Run) -> None:
    with pytest.raises(RunError, match=r"--resume: .*x holds no run; start it without --resume"):
        run.require_fresh(resume=True)


def test_a_folder_of_other_things_is_refused_without_a_wrong_hint(run: Run) -> None:
    (run.folder / "logs").mkdir(parents=True)
    with pytest.raises(RunError, match="x holds files but no run; remove it, or choose another") as error:
        run.require_fresh(resume=False)
    assert "--resume" not in str(error.value)


def test_a_file_is_no_folder(run: Run) -> None:
    run.folder.parent.mkdir()
    run.folder.write_text("")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"x is a file; choose a folder with --job\.run_dir="):
            run.require_fresh(resume)


def test_the_job_comes_back_as_it_was(run: Run) -> None:
    job = Job()
    job.model = Model(
        name="qwen3", flavor="debug", overrides={"blocks": {"full": {"mixer": {"head_dim": 8}}}}
    )
    job.data.sources = [Source(kind="text", path="a b", weight=0.5)]
    job.optimizer.groups = [
        OptimizerGroup(match=r".*\.weight", kind="muon", lr=0.02),
        OptimizerGroup(match="x"),
    ]
    job.sampling.prompts = ["Ünicode\n"]
    run.write_job(job, [])
    assert run.read_job() == job
    assert run.read_job() != Job()


def test_what_holds_no_job_is_refused(run: Run) -> None:
    with pytest.raises(
        RunError, match=r"x is no run folder: it has no config\.json; name one of a training run"
    ):
        run.read_job()
    run.folder.mkdir(parents=True)
    run.config.write_text('{"training": ')
    with pytest.raises(RunError, match=r"config\.json: cannot be read: .*; restore it from a copy"):
        run.read_job()
    run.config.write_text('{"training": {"step": 1}}')
    with pytest.raises(ConfigError, match=r"training\.step: no such key; did you mean 'steps'\?"):
        run.read_job()


def test_config_files_are_kept_as_given(run: Run, tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "sub" / "a.toml"
    b.parent.mkdir()
    a.write_text("# first\n")
    b.write_text("# second\n")
    (tmp_path / "c.toml").write_text("# third\n")
    run.write_job(Job(), [a, b, tmp_path / "c.toml"])
    kept = {p.name: p.read_text() for p in (run.folder / "config").iterdir()}
    assert kept == {"1_a.toml": "# first\n", "2_a.toml": "# second\n", "c.toml": "# third\n"}


def test_a_run_can_be_resumed_with_its_own_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("# third\n")
    run.write_job(Job(), [tmp_path / "c.toml"])
    run.write_job(Job(), [run.folder / "config" / "c.toml", run.config])
    assert [p.name for p in (run.folder / "config").iterdir()] == ["c.toml"]


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["/a/bin/nanovl", "train", "--job.description=two words"],
            "nanovl train '--job.description=two words'",
        ),
        (["/a/nanovl/__main__.py", "train", "--config", "x.toml"], "python -m nanovl train --config x.toml"),
    ],
)
def test_the_command_can_be_given_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str], command: str
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    run.write_job(Job(), [])
    run.begin("an abacus", 1, "1 rank")
    assert run.sessions()[0]["command"] == command


def test_sessions_are_added_and_ended(run: Run) -> None:
    assert run.sessions() == []
    run.write_job(Job(), [])
    run.begin("an abacus", 2, "2 ranks: dp_shard 2")
    run.begin("a slide rule", 1, "1 rank")
    run.note(param_dtype="bfloat16")
    run.end("stopped by SIGTERM")
    first, second = run.sessions()
    assert (first["hardware"], first["world_size"], first["mesh"]) == ("an abacus", 2, "2 ranks: dp_shard 2")
    assert first["exit_reason"] == "running"
    assert "ended" not in first
    assert second["hardware"] == "a slide rule"
    assert second["exit_reason"] == "stopped by SIGTERM"
    assert second["param_dtype"] == "bfloat16"
    assert first["python"] == sys.version.split()[0]
    assert set(first["versions"]) >= {"torch", "numpy"}
    moments = [time.strptime(session["started"], "%Y-%m-%dT%H:%M:%S%z") for session in (first, second)]
    assert moments[0] <= moments[1]
    assert time.strptime(second["ended"], "%Y-%m-%dT%H:%M:%S%z")
    (run.folder / "run.json").write_text("[")
    with pytest.raises(RunError, match=r"run\.json: cannot be read: .*; restore it from a copy"):
        run.sessions()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout that nanovl runs from, with one commit."""
    root = tmp_path / "checkout"
    (root / "nanovl").mkdir(parents=True)
    (root / "nanovl" / "run.py").write_bytes("# Grüße\n".encode("latin-1"))
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "one")
    monkeypatch.setattr(module, "__file__", str(root / "nanovl" / "run.py"))
    return root


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, check=True)
    return done.stdout.decode("latin-1").strip()


def test_a_clean_checkout(run: Run, checkout: Path) -> None:
    run.write_job(Job(), [])
    run.begin("an abacus", 1, "1 rank")
    session = run.sessions()[0]
    assert session["git_sha"] == git(checkout, "rev-parse", "HEAD")
    assert (session["git_dirty"], session["git_diff"]) == (False, "")
    assert not list(run.folder.glob("git*"))


def test_every_session_keeps_its_own_diff(run: Run, checkout: Path) -> None:
    run.write_job(Job(), [])
    for change in ("# Grüße, 1\n", "# Grüße, 2\n"):
        (checkout / "nanovl" / "run.py").write_bytes(change.encode("latin-1"))
        run.begin("an abacus", 1, "1 rank")
    assert [(s["git_dirty"], s["git_diff"]) for s in run.sessions()] == [
        (True, "git.diff"),
        (True, "git.2.diff"),
    ]
    diffs = [(run.folder / name).read_bytes() for name in ("git.diff", "git.2.diff")]
    assert [diff.splitlines()[-1] for diff in diffs] == [b"+# Gr\xfc\xdfe, 1", b"+# Gr\xfc\xdfe, 2"]
    git(checkout, "checkout", "--quiet", ".")
    for diff in diffs:  # the bytes are whole: the diff applies again
        (checkout / "d").write_bytes(diff)
        git(checkout, "apply", "--check", "d")


def test_a_new_file_makes_the_checkout_dirty(run: Run, checkout: Path) -> None:
    (checkout / "nanovl" / "new.py").write_text("")
    run.write_job(Job(), [])
    run.begin("an abacus", 1, "1 rank")
    session = run.sessions()[0]
    assert (session["git_dirty"], session["git_diff"]) == (True, "")


def test_outside_of_a_checkout_nothing_is_claimed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare").mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "bare" / "nanovl" / "run.py"))
    run.write_job(Job(), [])
    run.begin("an abacus", 1, "1 rank")
    git(tmp_path / "bare", "init", "--quiet")  # and a repository without a commit
    run.begin("an abacus", 1, "1 rank")
    assert [(s["git_sha"], s["git_dirty"], s["git_diff"]) for s in run.sessions()] == [("", False, "")] * 2


def test_json_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"text": "ü", "list": [1, 2.5, None]})
    assert (
        file.read_text(encoding="utf-8")
        == '{\n  "text": "ü",\n  "list": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    )
    assert read_json(file) == {"text": "ü", "list": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(file, {"text": object()})
    assert read_json(file)["text"] == "ü"
    with pytest.raises(RunError, match=r"b\.json: cannot be read: "):
        read_json(tmp_path / "b.json")


def write_for_ever(file: Path) -> None:
    number = 0
    while True:
        number += 1
        write_json(file, {"first": number, "long": ["x" * 100] * 5000, "last": number})


@pytest.mark.parametrize("milliseconds", [20, 35, 50])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path, milliseconds: int) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"first": 0, "last": 0})
    child = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(file,))
    child.start()
    deadline = time.monotonic() + 20
    while json.loads(file.read_text())["first"] == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(milliseconds / 1000)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    found = json.loads(file.read_text())
    assert found["first"] == found["last"] > 0
