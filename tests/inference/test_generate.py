from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovl.errors import ConfigError
from nanovl.generate import main
from nanovl.inference.engine import Engine
from nanovl.inference.load import load
from nanovl.inference.request import RequestError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert main([str(arg) for arg in argv]) == 0
    return capsys.readouterr().out


def test_prompts_are_continued_in_order(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    settings = {"max_tokens": 7, "temperature": 0.9, "top_k": 5, "top_p": 0.8, "seed": 3}
    expected = Engine(load(directory)).generate(["ab", "c"], **settings)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    shown = run(capsys, directory, "--prompt", "ab", "--prompt=c", *flags)
    assert shown == f"ab{expected[0].text}\n\nc{expected[1].text}\n"
    assert expected[0].text != expected[1].text


def test_greedy_is_the_default(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    expected = Engine(load(directory)).generate(["ab"], max_tokens=128)[0].text
    assert run(capsys, directory, "--prompt", "ab") == f"ab{expected}\n"


def test_json_holds_ids_and_logprobs_of_every_sample(
    capsys: pytest.CaptureFixture[str], directory: Path
) -> None:
    flags = ("--temperature", 1, "--top-k", 5, "--max-tokens", 5, "--num-samples", 2, "--json")
    shown = [
        json.loads(line) for line in run(capsys, directory, "--prompt=a", "--prompt=b", *flags).splitlines()
    ]
    assert [(one["prompt"], one["sample"]) for one in shown] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert shown[0]["ids"] != shown[1]["ids"]
    expected = Engine(load(directory)).generate(["b"], max_tokens=5, temperature=1.0, top_k=5)[0]
    for key, value in vars(expected).items():
        assert (
            shown[2][key] == pytest.approx(value, abs=1e-4) if "logprobs" in key else shown[2][key] == value
        )


def test_without_prompts_the_lines_of_stdin_are_continued(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    expected = run(capsys, directory, "--prompt=  ab", "--prompt=c", "--max-tokens=4")
    monkeypatch.setattr(sys, "stdin", io.StringIO("  ab\n\nc\n"))
    assert run(capsys, directory, "--max-tokens=4") == expected


def test_dtype_is_that_of_the_weights(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    flags = ("--prompt=ab", "--max-tokens=3", "--json", "--device=cpu")
    exact, rounded = (
        json.loads(run(capsys, directory, *flags, *more)) for more in ((), ("--dtype=bfloat16",))
    )
    assert exact["logprobs"] != rounded["logprobs"]


@pytest.mark.parametrize(
    ("stdin", "message"), [(Terminal(), "give --prompt TEXT"), (io.StringIO("\n"), "stdin holds no line")]
)
def test_no_prompt_at_all(monkeypatch: pytest.MonkeyPatch, stdin: io.StringIO, message: str) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ConfigError, match=f"no prompt: .*{message}"):
        main(["nowhere"])


def test_wrong_settings_are_told_before_anything_is_loaded() -> None:
    with pytest.raises(RequestError, match=r"top_p = 2\.0: wants a number above 0"):
        main(["nowhere", "--prompt=a", "--top-p=2"])
    with pytest.raises(ConfigError, match="--num-samples = 0: wants 1 or more"):
        main(["nowhere", "--prompt=a", "--num-samples=0"])
    with pytest.raises(
        ConfigError, match="--num-samples = 4 at temperature 0 is the same text each time: set --temp"
    ):
        main(["nowhere", "--prompt=a", "--num-samples=4"])
    with pytest.raises(SystemExit) as exit_info:
        main(["nowhere", "--top-q=2"])
    assert exit_info.value.code == 2
