"""Every command and every shipped job starts on a CPU; each is also given something it must refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def nanovl(*args: str, cwd: Path = ROOT, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nanovl", *args],
        cwd=cwd,
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    flags = [f for f in tiny_flags if not f.startswith(("--validation", "--sampling"))]
    more = [
        "--training.steps=3",
        "--validation.freq=2",
        "--validation.max_bytes=2000",
        "--metrics.tensorboard=true",
    ]
    more += ["--validation.final_max_bytes=4000", "--sampling.max_tokens=4", f"--job.run_dir={folder}"]
    done = nanovl("train", "--config", "configs/debug.toml", *flags, *more)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_everything(run: Path) -> None:
    for name in ("config.json", "run.json", "metrics.jsonl", "samples.jsonl", "report.md", "report.png"):
        assert (run / name).stat().st_size > 0, name
    for name in (
        "config/debug.toml",
        "logs/rank_0.log",
        "evals/step_000003.json",
        "tokenizer/tokenizer.json",
    ):
        assert (run / name).exists(), name
    assert list((run / "tb").glob("events.*"))
    session = json.loads((run / "run.json").read_text())["sessions"][-1]
    assert session["exit_reason"] == "finished"
    assert session["versions"]["torch"]
    final = json.loads((run / "evals" / "step_000003.json").read_text())
    assert final["val/bpb"] > 0
    assert set(final["compressors"]) == {"gzip -9", "xz -9"}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        "step",
        "tokens",
        "seconds",
        "train/loss",
        "optim/grad_norm",
        "optim/lr",
        "perf/tokens_per_second",
    }
    assert wanted | {"perf/mfu", "memory/peak_gib"} <= set(steps[0])


def test_a_used_folder_is_refused(run: Path, tiny_flags: list[str]) -> None:
    done = nanovl("train", "--config", "configs/debug.toml", *tiny_flags, f"--job.run_dir={run}")
    assert done.returncode == 1
    assert "is in use; continue it with --resume" in done.stderr


def test_generate_chat_evaluate_report(run: Path) -> None:
    done = nanovl("generate", str(run), "--prompt", "import", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "import" in done.stdout
    done = nanovl("chat", str(run), stdin="import os\nquit\n")
    assert done.returncode == 0, done.stderr
    done = nanovl("evaluate", str(run), "--max-bytes", "3000", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bpb"] > 0
    done = nanovl("report", str(run))
    assert done.returncode == 0, done.stderr


def test_evaluate_equals_the_training_run(run: Path) -> None:
    final = json.loads((run / "evals" / "step_000003.json").read_text())
    done = nanovl("evaluate", str(run), "--max-bytes", "4000", "--json")
    assert json.loads(done.stdout)["bpb"] == pytest.approx(final["val/bpb"], rel=1e-5)


def test_convert_there_and_back(run: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    from nanovl.inference.load import load

    assert nanovl("convert", str(run), "--to", "hf", "--out", str(tmp_path / "hf")).returncode == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = load(run, device="cpu")
    ids = ours.tokenizer.encode("def main():", bos=True)
    assert tokenizer("def main():")["input_ids"] == ids
    assert (ours.model(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 2e-5
    done = nanovl("convert", str(tmp_path / "hf"), "--to", "run", "--out", str(tmp_path / "back"))
    assert done.returncode == 0, done.stderr
    back = load(tmp_path / "back", device="cpu")
    for (name, x), (_, y) in zip(ours.model.named_parameters(), back.model.named_parameters(), strict=True):
        assert torch.equal(x, y), name
    done = nanovl("convert", str(run), "--to", "hf", "--out", str(tmp_path / "hf"))
    assert done.returncode == 1
    assert "is in use; name a new folder" in done.stderr


def test_config_commands() -> None:
    assert nanovl("config", "check", "--config", "configs/debug.toml").stdout.startswith("ok")
    shown = json.loads(nanovl("config", "show", "--config", "configs/debug.toml").stdout)
    assert shown["model"]["config"]["num_hidden_layers"] == 8
    assert json.loads(nanovl("config", "schema").stdout)["title"] == "nanovl job"
    done = nanovl("config", "check", "--config", "configs/debug.toml", "--world-size=3")
    assert done.returncode == 2
    assert "training.global_batch_size = 8 is not a multiple of 3 ranks x 2 rows = 6" in done.stderr


def test_data_and_tokenizer_commands(run: Path, tmp_path: Path) -> None:
    done = nanovl("data", "show", str(run), "--rows", "1")
    assert done.returncode == 0, done.stderr
    done = nanovl("tokenizer", "stats", str(run))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["trian"], 2, "no such command: trian; did you mean 'train'?"),
        (["train", "--confg", "x"], 2, "--confg: unknown option; did you mean --config?"),
        (["train", "--config", "configs/debug.toml", "--training.stps=3"], 2, "did you mean 'steps'?"),
        (["train", "--config", "configs/nope.toml"], 2, "configs/nope.toml: no such file"),
        (["train", "--config", "configs/debug.toml", "--model.depth=3"], 2, "model.depth: no such key"),
        (
            ["train", "--config", "configs/debug.toml", "--job.run_dir=/nonexistent/x", "--resume"],
            1,
            "holds no run",
        ),
        (["generate", "/nonexistent", "--prompt", "x"], 1, "/nonexistent: no such folder"),
        (["chat", "/nonexistent"], 1, "/nonexistent: no such folder"),
        (["evaluate", "/nonexistent"], 1, "/nonexistent: no such folder"),
        (["convert", "/nonexistent", "--to", "hf", "--out", "x"], 1, "/nonexistent: no such folder"),
        (["config", "chekc"], 2, "did you mean 'check'?"),
    ],
)
def test_bad_input_gets_one_clear_line(args: list[str], code: int, message: str) -> None:
    done = nanovl(*args)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_fast_and_needs_no_torch() -> None:
    for args in ("['--help']", "['train', '--help']", "['config', '--help']", "['config', 'schema']"):
        run = f"try: main({args})\nexcept SystemExit: pass"
        code = f"import sys; from nanovl.cli import main\n{run}\nsys.exit('torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, args + done.stderr
    code = "import sys, nanovl; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_job_trains_three_steps(path: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    narrow = ["--model.hidden_size=128", "--model.blocks.full.ffn.intermediate_size=256"]
    small = {
        "nanochat_d12": ["--model.depth=4"],
        "qwen3_0.6b": ["--model.num_hidden_layers=2", *narrow],
    }
    overlay = "configs/overlays/smoke.toml"
    flags = [
        f"--job.run_dir={tmp_path / 'run'}",
        f"--tokenizer.path={tokenizer_folder}",
        *small.get(path.stem, []),
    ]
    done = nanovl("train", "--config", str(path), "--config", overlay, *flags)
    assert done.returncode == 0, done.stderr
    assert "step     3/3" in done.stdout
