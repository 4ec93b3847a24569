"""`nanovl models`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovl.anatomy import compact
from nanovl.cli import main
from nanovl.errors import ConfigError
from nanovl.models_tools import WIDTH, find, short
from nanovl.models_tools import main as models
from nanovl.registry import MODELS, family, sizes

CONFIG = ["--config", str(Path(__file__).parents[2] / "configs" / "debug.toml")]


def numbers(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert models(["show", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_list_has_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert models(["list"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    for name in MODELS:
        block = re.search(rf"^{name} .*(?:\n .*)*", text, re.MULTILINE)
        assert block, name
        said = " ".join(block[0].split())
        assert family(name).summary in said
        for flavor in family(name).flavors:
            assert re.search(rf"(?: |^){re.escape(flavor)} [\d.]+[TBMk]", said), (name, flavor)
    assert "30b-a3b 30.5B (3.35B active)" in text


def test_the_list_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert models(["list", "--json"]) == 0
    found = {one["family"]: one for one in json.loads(capsys.readouterr().out)}
    assert [f"{name}:{f['flavor']}" for name, one in found.items() for f in one["flavors"]] == sizes()
    assert found["llama3"]["architecture"] == "LlamaForCausalLM"
    assert found["nanochat"]["architecture"] is None
    # arXiv:2505.09388: 30.5B, of which 3.3B are active
    assert found["qwen3_moe"]["flavors"][0] == {
        "flavor": "30b-a3b",
        "parameters": 30_532_122_624,
        "active": 30_532_122_624 - 48 * 120 * 3 * 2048 * 768,
    }


def test_numbers_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, "qwen3_moe:30b-a3b", "--context=4096")
    total, table = 30_532_122_624, 151_936 * 2048
    active = total - 48 * 120 * 3 * 2048 * 768
    assert found["parameters"] == {
        "total": total,
        "active": active,
        "without_input_embeddings": total - table,
        "active_without_input_embeddings": active - table,
    }
    assert sum(part["parameters"] for part in found["parts"]) == total
    assert found["layers"] == ["full"] * 48
    assert found["bytes"]["weights"] == found["bytes"]["gradients"] == 4 * total
    assert found["bytes"]["weights_bfloat16"] == 2 * total
    # two moments, and a count of steps for each parameter: 12 tensors a layer, and three others
    assert found["bytes"]["optimizer"] == {"AdamW": 2 * 4 * total + 4 * (48 * 12 + 3)}
    assert found["bytes"]["cache_per_token"] == 48 * 2 * 4 * 128 * 2
    (cost,) = found["flops_per_token"]
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    attention = 48 * 2 * 32 * (128 + 128) * 4097 / 2
    assert cost["forward"] == 2 * (active - table - norms) + attention
    assert cost["training"] == 3 * cost["forward"]
    assert cost["scores"] == pytest.approx(attention / cost["forward"])
    assert cost["cache_bytes"] == 4096 * found["bytes"]["cache_per_token"]


def test_a_tied_embedding_multiplies(capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, "qwen3:0.6b")
    counts = found["parameters"]
    assert counts["without_input_embeddings"] == counts["total"] == 596_049_920
    assert [part["name"] for part in found["parts"]] == ["embed_tokens", "full", "norm"]


def test_muon_and_states(capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, "nanochat_v1:d20")
    # 6 matrices a layer: momentum, and NorMuon's number for each row, or column of a wide one
    d, tables = 1280, 2 * 65536 * 1280
    sides = 4 * d + 4 * d + 4 * d
    assert found["bytes"]["optimizer"] == {
        "AdamW": 2 * 4 * tables + 2 * 4,
        "Muon": 4 * 20 * (12 * d * d + sides),
    }
    linear = numbers(capsys, "qwen3_next:80b-a3b")
    assert linear["bytes"]["cache_per_token"] == 12 * 2 * 2 * 256 * 2
    # 36 layers: 3 earlier tokens of 8192 channels in bfloat16, 32 matrices of 128 x 128 in float32
    assert linear["bytes"]["states_per_request"] == 36 * (3 * 8192 * 2 + 32 * 128 * 128 * 4)
    latent = numbers(capsys, "deepseek_v3:671b-a37b")  # 61 layers of a latent and a turned key
    assert latent["bytes"]["cache_per_token"] == 61 * (512 + 64) * 2


@pytest.mark.parametrize("name", MODELS)
def test_what_it_says_fits_a_terminal(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert models(["show", name]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    one, flavor = family(name), next(iter(family(name).flavors))
    config = one.flavors[flavor]()
    assert text.startswith(f"{name}:{flavor}  ")
    for template in config.layer_names():
        assert f"\n  {template}\n    mixer " in text
    for line in ("in all ", "gradients ", "optimizer state, AdamW ", "bytes a token in bfloat16"):
        assert line in text
    assert f"\n  {min(4096, config.max_position_embeddings):,} " in text


def test_settings_are_laid_over_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model.num_hidden_layers=2",
        "--model.blocks.full.mixer.sliding_window=5",
        "--model.vocab_size=97",
    ]
    found = numbers(capsys, "qwen3:debug", *flags)
    assert found["config"]["vocab_size"] == 97
    assert found["layers"] == ["full", "full"]
    assert models(["show", "qwen3:debug", *flags]) == 0
    assert "sliding_window = 5" in capsys.readouterr().out


def test_modules_ahead_and_what_transformers_lacks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.mtp.num_layers=1", "--model.mtp.loss_weight=0.1"]
    assert numbers(capsys, "qwen3_next:debug", *flags)["cannot_be_written"] == []
    assert models(["show", "qwen3_next:debug", *flags]) == 0
    text = capsys.readouterr().out
    assert "\n  mtp     1 x full: hidden = post_norm, loss_weight = 0.1\n" in text
    assert "not as changed" not in text
    assert models(["show", "qwen3_next:debug", *flags, "--model.mtp.block=linear"]) == 0
    text = capsys.readouterr().out
    assert "\n  mtp     1 x linear: " in text
    assert (
        "  transformers: Qwen3NextForCausalLM\n    not as changed: model.mtp.block = 'linear': cannot" in text
    )


def test_a_job_brings_its_vocabulary_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    group = [f"--optimizer.groups.{key}" for key in ("0.match=.*_proj.weight", "0.kind=muon", "1.match=.*")]
    found = numbers(capsys, *CONFIG, *group)
    assert found["family"] == "qwen3"
    assert found["config"]["vocab_size"] == 512
    assert set(found["bytes"]["optimizer"]) == {"AdamW", "Muon"}
    renamed = numbers(capsys, "llama3:debug", *CONFIG)
    assert renamed["family"] == "llama3"


def test_names_that_are_near() -> None:
    assert find("qwen3:30b-a3b") == ("qwen3_moe", "30b-a3b")
    assert find("Qwen3:8B") == ("qwen3", "8b")
    assert find("gemma3") == ("gemma3", "270m")
    for text, near in (
        ("qwen3:8x", "qwen3:8b"),
        ("qwen3:30b", "qwen3_moe:30b-a3b"),
        ("quen3:8b", "qwen3:8b"),
        ("30b-a3b", "qwen3_moe:30b-a3b"),
        ("lama3", "llama3:1b"),
        ("zzz", "nanovl models list shows what there is"),
    ):
        with pytest.raises(ConfigError, match=rf"{text}: no such model; .*{near}"):
            find(text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["shwo"], "shwo: no such verb; did you mean 'show'?"),
        (["zzz"], "zzz: no such verb; list or show"),
        (["show"], "name a model, such as qwen3:0.6b, or a job with --config FILE"),
        (["show", "qwen3", "--context=many"], "--context = 'many': wants one whole number above 0"),
        (["show", "qwen3", "--context=4096,8192"], "--context = '4096,8192': wants one whole number above 0"),
        (["show", "qwen3", "--jsn"], "--jsn: unknown option; did you mean --json"),
        (["show", "qwen3", "--training.steps=3"], "training: belongs to a job; name one with --config FILE"),
        (
            ["show", "qwen3", "--model.blocks.full.mixer.windw=3"],
            "model.blocks.full.mixer.windw: no such key",
        ),
        (["show", "qwen3", "--model.hidden_size=0"], "model.hidden_size = 0: wants a number above 0"),
        (["list", "--all"], "--all: unknown option; nanovl models list takes --json alone"),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        models(argv)


def test_a_job_with_anothers_flavor_hears_whose_it_is() -> None:
    from nanovl.registry import read_job

    with pytest.raises(ConfigError, match=r"qwen3 has no such size; did you mean qwen3_moe:30b-a3b\?"):
        read_job(CONFIG[1:], ["--model.name=qwen3", "--model.flavor=30b-a3b"])


def test_long_lists_of_layers() -> None:
    assert compact(["full"]) == "full"
    assert compact(["dense"] * 3 + ["moe"] * 58) == "3 x dense, 58 x moe"
    assert compact((["s"] * 5 + ["f"]) * 4 + ["s"] * 2) == "4 x (5 x s, f), 2 x s"
    assert compact(["d", *["s", "f"] * 9]) == "d, 9 x (s, f)"


def test_short_numbers() -> None:
    counts = (999, 1_000, 999_500, 671_026_400_000, 999_900_000_000, 1_026_408_200_000)
    assert [short(n) for n in counts] == ["999", "1k", "1M", "671B", "1T", "1.03T"]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from nanovl.cli import main\n"
        "assert main(['models', '--help']) == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nanovl models show FAMILY[:FLAVOR]" in done.stdout


def test_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "qwen3:8x"]) == 2
    assert "did you mean qwen3:8b" in capsys.readouterr().err
