"""What is printed where: ranks, files, colours, tables."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from nanovl.log import Log, err, out, table

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("setting", "shown"),
    [(None, [0]), ("0", [0]), ("1", [1]), ("0,2", [0, 2]), ("2, 1", [1, 2]), ("10", []), ("", [])],
)
def test_log_rank_names_the_ranks_that_are_shown(
    setting: str | None, shown: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if setting is None:
        monkeypatch.delenv("LOG_RANK", raising=False)
    else:
        monkeypatch.setenv("LOG_RANK", setting)
    for rank in range(3):
        Log(rank).say(f"rank {rank}")
        Log(rank).warn(f"rank {rank}")
    printed = capsys.readouterr()
    expected = "".join(f"rank {rank}\n" for rank in shown)
    assert (printed.out, printed.err) == (expected, expected)


def test_the_file_has_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOG_RANK", "0")
    log = Log(3, tmp_path / "logs")
    log.say("said: ü")
    log.warn("warned")
    log.note("noted")
    log.table(["name", "n"], [["a", 1]], title="title")
    text = (tmp_path / "logs" / "rank_3.log").read_text(encoding="utf-8")  # at once: not when it is closed
    log.close()
    log.close()
    log.say("after the end")
    lines = [
        f"{STAMP}said: ü",
        f"{STAMP}warning: warned",
        f"{STAMP}noted",
        f"{STAMP}title",
        "  name  n",
        "  a     1",
    ]
    assert re.fullmatch("".join(f"{line}\n" for line in lines), text)
    assert capsys.readouterr() == ("", "")
    Log(3, tmp_path / "logs").say("a resumed run")
    assert (tmp_path / "logs" / "rank_3.log").read_text(encoding="utf-8").startswith(text)


def test_notes_are_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOG_RANK", raising=False)
    Log().note("quiet")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("no_color", [True, False])
def test_colour_on_a_terminal_only_and_never_under_no_color(
    terminal: bool, no_color: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("LOG_RANK", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    log = Log(0, tmp_path)
    log.warn("careful")
    err("broken")
    colored = terminal and not no_color
    expected = "\033[33mcareful\033[0m\n\033[31mbroken\033[0m\n" if colored else "careful\nbroken\n"
    assert stream.getvalue() == expected
    assert "\033" not in (tmp_path / "rank_0.log").read_text()


def test_out(capsys: pytest.CaptureFixture[str]) -> None:
    out("a", end="")
    out("b")
    out()
    assert capsys.readouterr().out == "ab\n\n"


def test_table_puts_numbers_to_the_right() -> None:
    rows = [["embed_tokens", 32_768, 0.3, True], ["x", 5, 12.34567, False]]
    assert table(["group", "parameters", "lr", "decays"], rows) == (
        "  group         parameters     lr  decays\n"
        "  embed_tokens      32,768    0.3    True\n"
        "  x                      5  12.35   False"
    )


def test_a_column_with_one_word_stands_to_the_left() -> None:
    assert table(["n", "m"], [[1000, 1], ["none", 22]]) == "  n       m\n  1,000   1\n  none   22"


def test_a_table_without_rows_is_its_header() -> None:
    assert table(["a", "bc"], []) == "  a  bc"


def test_a_row_of_the_wrong_length_is_a_bug() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        table(["a"], [[1, 2]])
