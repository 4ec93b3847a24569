"""`nanovl plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanovl.cli import main
from nanovl.config_tools import main as config
from nanovl.errors import ConfigError
from nanovl.plan import OPTIONS
from nanovl.plan import main as plan
from nanovl.planning.hardware import GPUS, SHORT, gpu_called

CONFIG = ["--config", str(Path(__file__).parents[2] / "configs" / "debug.toml")]


def test_numbers_agree_with_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--world-size=16", "--training.global_batch_size=64", "--gpu=NVIDIA H200", "--price=2", "--json"]
    assert plan([*CONFIG, *flags, "--activation_checkpoint.mode=full"]) == 0
    found = json.loads(capsys.readouterr().out)
    (rank,) = found["ranks"]
    # 8 layers, hidden 64, 8 heads and 4 key/value heads of 16, ffn 128, vocabulary 512, float32
    layer = 64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 128 + 2 * 64 + 2 * 16
    parameters = 8 * layer + 2 * 512 * 64 + 64
    assert rank["memory"]["parameters"] == 4 * parameters / 16
    assert rank["memory"]["optimizer"] == pytest.approx(2 * rank["memory"]["gradients"], rel=0.01)
    sent = {(t["why"], t["collective"]): t["bytes"] for t in rank["traffic"] if t["axis"] == "fsdp"}
    # 2 micro-batches: layers are gathered for forward and for backward, the rest once
    assert sent["sharding", "all-gather"] == 4 * 2 * (parameters + 8 * layer)
    assert sent["sharding", "reduce-scatter"] == 4 * 2 * parameters
    assert found["tokens_per_step"] == 64 * 128
    products = 2 * (8 * (layer - 2 * 64 - 2 * 16) + 512 * 64)
    attention = 8 * 2 * 8 * (16 + 16) * (128 + 1) / 2
    assert found["flops_per_step"] == pytest.approx(3 * (products + attention) * 64 * 128)
    seconds = found["seconds"]
    assert found["tokens_per_second"] == pytest.approx(64 * 128 / seconds["step"])
    assert found["cost_of_run"] == pytest.approx(2 * 16 * 20 * seconds["step"] / 3600)
    assert found["fits"]


def test_table_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--world-size", "2", "--parallelism.pipeline_parallel_degree=2"]
    assert plan([*CONFIG, *flags, "--mfu-ceiling=0.4"]) == 0
    text = capsys.readouterr().out
    assert "qwen3 debug" in text
    assert "micro-batches of 2 rows, 4 on each rank" in text
    assert "between stages" in text
    assert re.search(r"waiting in the pipeline \(bubble \d+%\)", text)
    assert "products reach 0.4 of the peak" in text
    assert "  fits: " in text
    assert "cost" not in text


def test_kernels_of_a_gpu_keep_what_they_keep(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for name in ("auto", "flex", "varlen"):
        flags = [
            f"--model.blocks.full.mixer.kernel={name}",
            "--training.mixed_precision_param=bfloat16",
            "--json",
        ]
        assert plan([*CONFIG, *flags]) == 0
        found[name] = json.loads(capsys.readouterr().out)["ranks"][0]["memory"]["activations"]
    mask, copies = (
        2 * 128 * 128,
        2 * (8 - 4) * 16 * 2 * 2 * 128,
    )  # 2 rows; key and value heads of 16, bfloat16
    assert found["flex"] - found["varlen"] == pytest.approx(mask, abs=256)  # starts of documents instead
    # auto is sdpa: each of 8 layers makes a mask of its own to add, and copies keys and values for all heads
    assert found["auto"] - found["varlen"] == pytest.approx(8 * (2 * mask + copies), abs=256)


def test_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpu=RTX4090", "--training.seq_len=131072", "--training.local_batch_size=8"]
    assert plan([*CONFIG, *flags]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert 'activation_checkpoint.mode = "full"' in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--gpu=H10"],
            r"--gpu = 'H10': its rates are not known; did you mean 'h100'\? There are h100 \(NVIDIA H1",
        ),
        (["--gpu=TPU"], r"not known; There are .*, rtx5090 \(NVIDIA GeForce RTX 5090\)"),
        (["--world-size=0"], "--world-size = '0': wants a whole number above 0"),
        (["--world-size=2.5"], "--world-size = '2.5': wants a whole number above 0"),
        (["--price=free"], "--price = 'free': wants a number above 0"),
        (["--mfu-ceiling=1.5"], "--mfu-ceiling = '1.5': wants a number above 0, 1 at most"),
        (["--worldsize=8"], "did you mean --world-size?"),
        (["--world-size=6"], "training.global_batch_size = 8 is not a multiple of 6 ranks x 2 rows = 12"),
        (
            ["--world-size=6", "--parallelism.tensor_parallel_degree=4"],
            "parallelism.tensor_parallel_degree = 4 does not divide the 6 ranks",
        ),
        (
            ["--world-size=8", "--parallelism.pipeline_parallel_degree=8", "--model.num_hidden_layers=4"],
            "the model's 4 layers are too few for 8 stages",
        ),
        (
            ["--world-size=2", "--parallelism.expert_parallel_degree=2"],
            "parallelism.expert_parallel_degree = 2: qwen3 has no experts; set it to 1",
        ),
    ],
)
def test_refuses_what_training_would_refuse(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan([*CONFIG, *flags])
    if not any(flag.partition("=")[0] in ("--gpu", "--price", "--mfu-ceiling") for flag in flags):
        with pytest.raises(ConfigError) as checked:
            config(["check", *CONFIG, *flags])
        assert str(checked.value) == str(caught.value)


def test_gpus_have_short_names() -> None:
    assert sorted(SHORT.values()) == sorted(GPUS)
    assert all(short in OPTIONS["--gpu=NAME"] for short in SHORT)
    for name in ("A100", "a100", "nvidia a100-sxm4-80gb"):
        assert gpu_called(name).name == "NVIDIA A100-SXM4-80GB"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from nanovl.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--mfu-ceiling=SHARE" in done.stdout


def test_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CONFIG, "--gpu=H300"]) == 2
    assert "nanovl plan: config error" in capsys.readouterr().err
