"""Reports of run folders made of the files that a run writes, with numbers worked out by hand."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from nanovl.cli import main as nanovl
from nanovl.config.schema import Job, Model, OptimizerGroup, Source
from nanovl.errors import ConfigError, RunError
from nanovl.metrics import Metrics
from nanovl.plots import median_after_first, scientific, short, smooth, spread, token_unit
from nanovl.registry import resolve_model, spec_to_dict
from nanovl.report import main, write_report
from nanovl.report.facts import parameter_counts, read_facts, settings
from nanovl.report.pages import code, fence, table
from nanovl.run import Run, write_json

BLUE = (0, 114, 178)
"""#0072B2, the first run's colour."""


def job(**training: Any) -> Job:
    made = Job()
    made.job.description = "a job of nothing"
    made.model = Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": 2})
    made.data.sources = [Source(kind="stdlib", holdout=0.125)]
    made.sampling.prompts = ["import ", "a `b`"]
    made.training.steps, made.training.seq_len, made.training.global_batch_size = 40, 128, 8
    for name, value in training.items():
        setattr(made.training, name, value)
    return made


def train_record(step: int, loss: float, speed: float, **other: Any) -> dict[str, Any]:
    """The keys that the trainer writes."""
    return {
        "step": step,
        "tokens": step * 1024,
        "seconds": step * 0.5,
        "flops": step * 1e9,
        "train/loss": loss,
        "optim/grad_norm": 0.5 + 1 / step,
        "optim/lr": 1e-3,
        "perf/tokens_per_second": speed,
        "perf/data_wait": 0.01,
        "perf/mfu": None,
        "memory/peak_gib": 0.25 + step / 100,
        "data/documents": 3,
        "data/tokens": 1024,
        "data/utilisation": 1.0,
        "data/cropped": 0.0,
        "data/wait_seconds": 0.1,
        "data/tokens_per_second": 1e6,
        "data/epoch": 0,
        **other,
    }


def val_record(step: int, bpb: float, size: int) -> dict[str, Any]:
    found = {"val/bpb": bpb, "val/bytes": size, "val/tokens": size // 3}
    return {"step": step, "tokens": step * 1024, "seconds": step * 0.5, **found}


TRAIN = [
    train_record(
        1, 6.0, 100.0, **{"perf/mfu": 0.01, "data/tokens": 90, "data/utilisation": 0.9, "data/cropped": 0.1}
    ),
    train_record(
        20, 5.0, 4000.0, **{"perf/mfu": 0.30, "data/tokens": 10, "data/utilisation": 0.1, "data/cropped": 0.5}
    ),
    train_record(30, 4.0, 1000.0, **{"perf/mfu": 0.50, "data/utilisation": 0.0}),
    train_record(
        40, 3.0, 3000.0, **{"perf/mfu": 0.40, "data/tokens": 0, "data/utilisation": 0.0, "data/epoch": 1}
    ),
]


def begin(run: Run, made: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/nanovl", "train", "--config", "a b.toml"])
    run.write_job(made, [])
    run.begin("an abacus, 2 cores", 2, "2 ranks: dp_shard 2")


def log(run: Run, *records: dict[str, Any]) -> None:
    metrics = Metrics(run.folder)
    for record in records:
        metrics.write(record)
    metrics.close()


def evaluation(run: Run, step: int, bpb: float, compressors: dict[str, float] | None = None) -> None:
    (run.folder / "evals").mkdir(exist_ok=True)
    found: dict[str, Any] = {"step": step, "val/bpb": bpb, "val/bytes": 1_300_000, "val/tokens": 400_000}
    if compressors is not None:
        found["compressors"] = compressors
    write_json(run.folder / "evals" / f"step_{step:06d}.json", found)


def sample(run: Run, step: int, prompt: str, completion: str) -> None:
    with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "prompt": prompt, "completion": completion}) + "\n")


def checkpoint(run: Run, made: Job, step: int = 40, vocab_size: int = 512) -> None:
    folder = run.checkpoints / f"step_{step:06d}"
    folder.mkdir(parents=True)
    meta = {"stage": "pretrain", "model": spec_to_dict(resolve_model(made.model, vocab_size)), "step": step}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(tmp_path / "runs" / "abacus")
    made = job(mixed_precision_param="bfloat16")
    begin(run, made, monkeypatch)
    log(run, *TRAIN[:2], val_record(20, 1.75, 100_000), *TRAIN[2:], val_record(40, 1.5, 1_300_000))
    evaluation(run, 20, 1.75)
    evaluation(run, 40, 1.5, {"gzip -9": 2.0, "xz -9": 1.8})
    sample(run, 20, "import ", "early")
    sample(run, 40, "import ", "os\n```\nfence")
    sample(run, 40, "a `b`", "<b>| c")
    checkpoint(run, made)
    run.end("finished")
    return run


def rows(page: str) -> dict[str, str]:
    """First cell -> the others, of every table row."""
    lines = [line.strip("| ").split(" | ", 1) for line in page.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def quadrants_in_blue(picture: Path) -> list[int]:
    """Blue pixels of the four panels: loss, held-out, schedule, speed."""
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    blue = (pixels == BLUE).all(axis=-1)
    height, width = blue.shape
    assert (height, width) == (1056, 1600)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    middle = int(0.455 * width), height // 2
    halves = (blue[: middle[1]], blue[middle[1] :])
    return [int(part.sum()) for half in halves for part in (half[:, : middle[0]], half[:, middle[0] :])]


def test_summary_of_a_finished_run(finished: Run) -> None:
    file = write_report(finished)
    assert file == finished.folder / "report.md"
    page = file.read_text(encoding="utf-8")
    assert page.startswith(
        "# abacus\n\na job of nothing\n\n40 of 40 steps, 40,960 tokens in 20s of training. Finished.\n"
    )
    found = rows(page)
    # 2 layers of 98,624 / 2; embedding and head 512 x 64 each; one norm of 64
    assert found["parameters"] == "164,224 (131,456 without embeddings)"
    assert found["architecture"] == "qwen3: 2 layers, hidden size 64, vocabulary 512"
    assert found["flavor"] == "debug, changed by the settings below"
    assert found["steps"] == "40 of 40"
    assert found["tokens"] == "40,960"
    assert found["tokens a step"] == "1,024 (8 rows)"
    assert found["sequence length"] == "128 tokens"
    assert found["training loss"] == "4.5000 nats per token (mean of the last 4 logged steps)"
    assert found["training time"] == "20s, without validation, samples and saving"
    assert found["tokens per second"] == "3,000 (median after the first window)"
    assert found["FLOPs"] == "4e+10"
    assert found["MFU"] == "40.0%"
    assert found["peak memory"] == "0.65 GiB on rank 0"
    assert found["mesh"] == "2 ranks: dp_shard 2"
    assert found["compute dtype"] == "bfloat16; gradients summed in float32"
    # 90 + 10 tokens on 100 + 100 positions; 10 + 10 cropped, 120 read
    assert found["data"].startswith(
        "50.0% of positions carried loss, 16.7% of the tokens read were cropped away, epoch 2"
    )


def test_held_out_text_stands_beside_compressors(finished: Run) -> None:
    found = rows(write_report(finished).read_text(encoding="utf-8"))
    assert found["on the same 1,300,000 bytes"] == "bits per byte | ratio to gzip -9"
    assert found["model, step 40"] == "1.5000 | 0.750"
    assert found["gzip -9"] == "2.0000 | 1.000"
    assert found["xz -9"] == "1.8000 | 0.900"


def test_samples_and_sessions_are_verbatim(finished: Run) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    assert "After step 40, each prompt" in page
    assert "early" not in page
    assert '`"import "`\n\n````text\nos\n```\nfence\n````' in page
    assert '``"a `b`"``\n\n```text\n<b>| c\n```' in page
    assert "### Session 1\n\n```sh\nnanovl train --config 'a b.toml'\n```" in page
    session = finished.sessions()[0]
    found = rows(page)
    assert found["started"] == session["started"]
    assert found["ended"] == session["ended"]
    assert found["exit reason"] == "finished"
    assert found["versions"].startswith(f"python {sys.version.split()[0]}, nanovl ")
    assert f"torch {session['versions']['torch']}" in found["versions"]
    assert found["ranks"] == "2"


@pytest.mark.parametrize(
    ("git", "words"),
    [
        ({"git_sha": "f" * 40, "git_dirty": False, "git_diff": ""}, "f" * 40 + ", clean"),
        (
            {"git_sha": "f" * 40, "git_dirty": True, "git_diff": "git.2.diff"},
            "f" * 40 + ", dirty (changes in git.2.diff)",
        ),
        (
            {"git_sha": "f" * 40, "git_dirty": True, "git_diff": ""},
            "f" * 40 + ", dirty (files that git does not track)",
        ),
        ({"git_sha": "", "git_dirty": False, "git_diff": ""}, "not known: not run from a git checkout"),
    ],
)
def test_commit(finished: Run, git: dict[str, Any], words: str) -> None:
    finished.note(**git)
    assert rows(write_report(finished).read_text(encoding="utf-8"))["commit"] == words


def test_settings_that_differ(finished: Run) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    listed = page.split("## Settings that differ from the defaults")[1]
    assert 'model.name = "qwen3"\nmodel.flavor = "debug"\nmodel.num_hidden_layers = 2\n' in listed
    assert 'data.sources.0.kind = "stdlib"\ndata.sources.0.holdout = 0.125\n' in listed
    assert "training.seq_len = 128\n" in listed
    assert "training.local_batch_size" not in listed
    assert "optimizer.lr" not in listed


def test_settings_walk_lists_and_nested_tables() -> None:
    made = Job()
    made.optimizer.groups = [OptimizerGroup(match="a|b", lr=0.5)]
    made.model.overrides = {"blocks": {"full": {"window": 8}}}
    changed = {key: value for key, value, differs in settings(made) if differs}
    assert changed == {
        "optimizer.groups.0.match": "a|b",
        "optimizer.groups.0.lr": 0.5,
        "model.blocks.full.window": 8,
    }
    every = {key: value for key, value, _ in settings(made)}
    assert every["optimizer.muon.momentum"] == 0.97
    assert every["data.sources"] == []


def test_picture_has_a_curve_in_every_panel(finished: Run) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    assert "(report.png)" in page
    assert all(count > 300 for count in quadrants_in_blue(finished.folder / "report.png"))


def test_a_run_whose_numbers_are_none_is_drawn(finished: Run) -> None:
    nan = float("nan")
    log(finished, train_record(41, nan, 3000.0, **{"optim/grad_norm": nan}), val_record(41, nan, 1_300_000))
    assert "(report.png)" in write_report(finished).read_text(encoding="utf-8")
    finished.metrics.write_text("")
    log(finished, train_record(1, nan, 3000.0, **{"optim/grad_norm": nan}), val_record(1, nan, 1_300_000))
    assert "(report.png)" in write_report(finished).read_text(encoding="utf-8")


def test_a_run_killed_after_three_steps(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "killed")
    begin(run, job(), monkeypatch)
    shutil.copytree(tokenizer_folder, run.tokenizer)
    log(run, *(train_record(step, 6.0, 1000.0) for step in (1, 2, 3)))
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "tokens": 40')
    page = write_report(run).read_text(encoding="utf-8")
    assert (
        "3 of 40 steps, 3,072 tokens in 2s of training. Still running when this was written, or killed since."
        in page
    )
    assert "## Held-out text\n\nNot measured: the run did not reach an evaluation.\n" in page
    assert "## Samples\n\nNone: the run did not reach a step that makes samples.\n" in page
    found = rows(page)
    assert found["parameters"] == "164,224 (131,456 without embeddings)"  # by the tokenizer's 512 entries
    assert found["MFU"] == "not known: no peak is on record for this device"
    assert found["compute dtype"].startswith("chosen by the machine, in logs/rank_0.log")
    assert found["ended"] == "not known"
    loss, held_out, schedule, speed = quadrants_in_blue(run.folder / "report.png")
    assert held_out == 0
    assert min(loss, schedule, speed) > 300


def test_a_run_that_logged_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "nothing")
    made = job(steps=0, global_batch_size=0)
    made.validation.freq, made.sampling.prompts = 0, []
    begin(run, made, monkeypatch)
    run.end("failed: config error\n  training.steps = 0 | no")
    page = write_report(run).read_text(encoding="utf-8")
    assert "No step was logged. Failed: config error training.steps = 0 | no." in page
    assert "Not measured: `validation.freq` is 0." in page
    assert "None: `sampling.prompts` is empty." in page
    found = rows(page)
    assert found["parameters"].startswith(
        "not known: there is no checkpoint, and no tokenizer that says how large"
    )
    assert found["exit reason"] == "failed: config error training.steps = 0 \\| no"
    assert found["steps"] == "0 of an unknown number"
    for key in ("tokens a step", "training loss", "tokens per second", "MFU", "peak memory"):
        assert found[key] == "not known"
    assert quadrants_in_blue(run.folder / "report.png") == [0, 0, 0, 0]


def test_a_folder_without_sessions(tmp_path: Path) -> None:
    """What `nanovl convert --to run` makes: a job and weights, but no training."""
    run = Run(tmp_path / "converted")
    made = job()
    run.write_job(made, [])
    checkpoint(run, made, step=0)
    page = write_report(run).read_text(encoding="utf-8")
    assert "Not known: run.json records no session: these weights were not trained here." in page
    assert rows(page)["hardware"] == "not known"
    assert rows(page)["parameters"] == "164,224 (131,456 without embeddings)"


def test_a_broken_checkpoint_is_named(finished: Run) -> None:
    (finished.checkpoints / "step_000040" / "meta.json").write_text("{")
    found = rows(write_report(finished).read_text(encoding="utf-8"))
    assert found["parameters"].startswith("not known: ")
    assert "step_000040: not a complete checkpoint" in found["parameters"]


def test_a_resumed_run_reports_only_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands at step 20; a session killed later had evaluated and sampled at step 40."""
    run = Run(tmp_path / "resumed")
    begin(run, job(), monkeypatch)
    begin(run, job(), monkeypatch)
    run.note(param_dtype="bfloat16")
    log(run, *TRAIN[:2], val_record(20, math.inf, 0), val_record(20, 1.75, 100_000))
    evaluation(run, 40, 1.5, {"gzip -9": 2.0, "xz -9": 1.8})
    for step, text in ((20, "first"), (20, "again"), (40, "later")):
        sample(run, step, "import ", text)
    page = write_report(run).read_text(encoding="utf-8")
    assert "again" in page
    assert "first" not in page.split("## Samples")[1].split("## How")[0]
    assert "later" not in page
    found = rows(page)
    assert found["model, step 20"] == "1.7500 | not known"
    assert "gzip and xz were not measured: that happens at the end of the run." in page
    assert found["compute dtype"].startswith("bfloat16;")
    assert "| exit reason | killed: it never said why it ended |" in page
    assert "### Session 2" in page


def test_a_run_trained_on_after_its_end(finished: Run) -> None:
    log(finished, train_record(60, 2.5, 3000.0), val_record(60, 1.25, 100_000))
    page = write_report(finished).read_text(encoding="utf-8")
    assert rows(page)["model, step 40"] == "1.5000 | 0.750"
    assert (
        "Trained on to step 60: 1.2500 bits per byte on 100,000 bytes, without gzip and xz beside it." in page
    )


def test_a_report_written_before_the_session_closes(finished: Run) -> None:
    finished.note(exit_reason="running")
    page = write_report(finished).read_text(encoding="utf-8")
    assert "All steps are taken, and the session had not closed when this was written." in page


def test_what_is_no_run_is_refused(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"is no run folder: it has no config\.json; name one of a training run"
    ):
        write_report(Run(tmp_path / "absent"))
    with pytest.raises(
        RunError, match=r"step_000040 is a checkpoint, not a run; name the run folder above it"
    ):
        write_report(Run(finished.checkpoints / "step_000040"))
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(
        RunError, match="hf is a Hugging Face directory, not a run; name the run it came from"
    ):
        write_report(Run(hugging_face))
    text = finished.metrics.read_text().replace('{"step": 20', '{"step": 20"', 1)
    finished.metrics.write_text(text)
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 is no JSON: .*; remove that line"):
        write_report(finished)
    assert not (finished.folder / "report.md").exists()


def test_command_line_of_one_run(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished.folder)]) == 0
    assert capsys.readouterr().out == (
        f"{finished.folder}/report.md\n"
        "  abacus: 40 of 40 steps, 40,960 tokens in 20s of training; 1.5000 bits per byte, 0.750 x gzip -9\n"
    )
    elsewhere = tmp_path / "new" / "folder" / "a.md"
    assert main([str(finished.folder), "--out", str(elsewhere)]) == 0
    assert "(a.png)" in elsewhere.read_text(encoding="utf-8")
    assert imread(elsewhere.with_suffix(".png")).shape[:2] == (1056, 1600)


def test_command_line_mistakes(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(finished.folder)
    with pytest.raises(
        ConfigError, match="--out: missing; 2 runs are compared in a file of their own"
    ) as error:
        main([one, f"{one}/../abacus"])
    assert error.value.mistakes[1] == f"{one}/../abacus: named twice; name it once"
    with pytest.raises(
        ConfigError, match=r"--out a\.png: wants a name that ends in \.md; the curves go beside"
    ):
        main([one, "--out", "a.png"])
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"a\.md: cannot be written: .*; choose another place with --out FILE\.md"
    ):
        main([one, "--out", str(tmp_path / "file" / "a.md")])
    assert nanovl(["report", str(tmp_path / "absent")]) == 1
    assert nanovl(["report", one, "--out", "x"]) == 2
    assert "nanovl report: " in capsys.readouterr().err


def test_comparison(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Run(tmp_path / "runs" / "other")
    made = job(mixed_precision_param="bfloat16", seq_len=256)
    made.model.overrides = {"num_hidden_layers": 1}
    begin(other, made, monkeypatch)
    other.note(git_sha="0123456789abcdef", git_dirty=False, git_diff="")
    log(other, train_record(1, 6.0, 500.0), train_record(2, 4.0, 700.0))
    checkpoint(other, made, step=2)
    file = tmp_path / "compare.md"
    assert main([str(finished.folder), str(other.folder), "--out", str(file)]) == 0
    assert (
        "  other: 2 of 40 steps, 2,048 tokens in 1s of training; held-out text not measured\n"
        in capsys.readouterr().out
    )
    page = file.read_text(encoding="utf-8")
    lines = page.splitlines()
    assert lines[0] == "# Comparison of 2 runs"
    assert (
        "| abacus | 164,224 | 40 | 40,960 | 4.5000 | 1.5000 | 0.750 | 3,000 | 40.0% | 20s | 0.65 |" in lines
    )
    assert (
        "| other | 114,912 | 2 | 2,048 | 5.0000 | not measured | not measured | 700 | not known | 1s | 0.27 |"
        in lines
    )
    assert rows(page)["training.seq_len"] == "128 | 256"
    assert rows(page)["model.num_hidden_layers"] == "2 | 1"
    differing = page.split("## Settings in which they differ")[1]
    assert differing.count("\n| ") == 4  # header, rule and the two
    assert "| 2 | 0123456789, clean | still running when this was written, or killed since |" in page
    assert "do not compare" not in page
    assert "(compare.png)" in page
    assert min(quadrants_in_blue(tmp_path / "compare.png")) > 100


def test_comparison_says_what_does_not_compare(finished: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    twin = Run(tmp_path / "elsewhere" / "abacus")
    shutil.copytree(finished.folder, twin.folder)
    shutil.copytree(tokenizer_folder, twin.tokenizer)
    evaluation(twin, 40, 1.6, {"gzip -9": 2.5, "xz -9": 1.8})
    file = tmp_path / "compare.md"
    main([str(finished.folder), str(twin.folder), "--out", str(file)])
    page = file.read_text(encoding="utf-8")
    assert "Bits per byte do not compare here: they were measured on different held-out text." in page
    assert "Training losses do not compare here: they count tokens of different tokenizers." in page
    assert f"| {finished.folder} |" in page  # two runs called abacus go by their paths
    assert f"| {twin.folder} |" in page
    assert page.endswith("## Settings in which they differ\n\nNone.\n")


def test_parameter_counts_of_a_tied_head() -> None:
    spec = resolve_model(
        Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": 1, "tie_word_embeddings": True}),
        512,
    )
    # attention 24,576, mlp 24,576, norms 2 x 64 + 2 x 16 = 160, last norm 64, one table of 512 x 64
    assert parameter_counts(spec) == (82_144, 49_376)


def test_facts_without_windows_of_data_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "x")
    begin(run, job(), monkeypatch)
    log(run, {k: v for k, v in train_record(1, 6.0, 100.0).items() if not k.startswith("data/")})
    assert read_facts(run).data_use is None
    page = write_report(run).read_text(encoding="utf-8")
    assert rows(page)["data"] == "utilisation not known"
    assert rows(page)["tokens per second"] == "100 (the only window, with its warm-up)"


def test_importing_the_command_loads_no_torch_and_no_matplotlib() -> None:
    program = "import sys, nanovl.report; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_smooth_keeps_lines_and_averages_the_rest() -> None:
    line = [3.0 * i + 1 for i in range(9)]
    assert smooth(line, 3) == pytest.approx(line)
    # at the ends the line through the first (last) three: mean 1, slope 3/2 over places -1, 0, 1
    assert smooth([0, 0, 3, 0, 0], 1) == pytest.approx([-0.5, 1, 1, 1, -0.5])
    assert smooth([7.0], 4) == [7.0]
    assert smooth([1.0, 2.0], 4) == [1.0, 2.0]
    many = np.random.default_rng(0).normal(size=200)
    middle = smooth(many.tolist(), 5)[100]
    assert middle == pytest.approx(many[95:106].mean())


def test_labels_are_moved_apart_around_their_middle() -> None:
    assert spread([1.0, 1.0, 5.0], 1.0) == [0.5, 1.5, 5.0]
    assert spread([5.0, 1.0], 1.0) == [5.0, 1.0]
    # the first two move to -0.25 and 0.75, which touches the third: all three stand around 1.7 / 3
    assert spread([0.0, 0.5, 1.2], 1.0) == pytest.approx([1.7 / 3 - 1, 1.7 / 3, 1.7 / 3 + 1])


def test_numbers_on_axes() -> None:
    assert token_unit(0) == (1.0, "")
    assert token_unit(999) == (1.0, "")
    assert token_unit(20_480) == (1e3, " (thousands)")
    assert token_unit(3.2e9) == (1e9, " (billions)")
    assert [short(v) for v in (0, 999, 12_345, 1.3e6, 2e9)] == ["0", "999", "12.3k", "1.3M", "2G"]
    assert [scientific(v) for v in (0, 1e-3, 2.5e-4, 0.02)] == ["0", "1e-3", "2.5e-4", "2e-2"]
    assert median_after_first([1.0]) == 1.0
    assert median_after_first([1.0, 5.0, 7.0]) == 6.0


def test_markdown_survives_any_text() -> None:
    assert table(("a|b", "c"), [("x\ny", "1")], numbers=1) == "| a\\|b | c |\n| --- | ---: |\n| x y | 1 |"
    assert fence("a") == "```text\na\n```"
    assert fence("a ```` b") == "`````text\na ```` b\n`````"
    assert code("a") == "`a`"
    assert code("a`b") == "``a`b``"
