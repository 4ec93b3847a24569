from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanovl.chat import Chat, main
from nanovl.inference.engine import Engine
from nanovl.inference.load import load
from nanovl.inference.request import Request, RequestError
from nanovl.log import Log

GREEDY = Request(prompt_ids=[], max_tokens=6)


def chat_on(directory: Path, settings: Request = GREEDY, **engine: Any) -> Chat:
    return Chat(Engine(load(directory), **engine), settings, Log())


def continued(directory: Path, text: str) -> str:
    return Engine(load(directory)).generate([text], max_tokens=6)[0].text


def test_the_text_grows_by_turns(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    chat = chat_on(directory)
    chat.turn("ab")
    first = capsys.readouterr().out.removesuffix("\n")
    assert first == continued(directory, "ab")
    chat.turn(" cd")
    second = capsys.readouterr().out.removesuffix("\n")
    assert second == continued(directory, f"ab{first}\n cd")
    chat.turn("")  # goes on where it stopped
    assert capsys.readouterr().out.removesuffix("\n") == continued(directory, f"ab{first}\n cd{second}")


def test_clear_begins_a_new_text(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    chat = chat_on(directory)
    chat.turn("ab")
    first = capsys.readouterr().out
    for command in ("clear", "/clear", " /clear "):
        chat.turn(command)
        assert capsys.readouterr().out == "(new text)\n"
        chat.turn("")  # nothing to go on from
        chat.turn("ab")
        assert capsys.readouterr().out == first


def test_an_answer_to_the_same_text_is_another_sample(
    capsys: pytest.CaptureFixture[str], directory: Path
) -> None:
    chat = chat_on(directory, Request(prompt_ids=[], max_tokens=20, temperature=1.0, top_k=5))
    shown = []
    for _ in range(2):
        chat.turn("ab")
        shown.append(capsys.readouterr().out)
        chat.turn("/clear")
        capsys.readouterr()
    assert shown[0] != shown[1]


def test_settings_change_by_command(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    chat = chat_on(directory)
    for line, answer in (
        ("/temperature 0.5", "temperature is now 0.5\n"),
        ("/topk 7", "top_k is now 7\n"),
        ("/temperature hot", "not changed: temperature = 'hot': wants a number\n"),
        ("/topk 1.5", "not changed: top_k = '1.5': wants a number\n"),
        ("/topk", "not changed: top_k = '': wants a number\n"),
        ("/topk -1", "not changed: request: top_k = -1: wants 1 or more, or 0 for all tokens\n"),
        ("/tmp", "no such command: /tmp; /help lists them. A text that begins so needs a space before it\n"),
    ):
        assert chat.turn(line)
        assert capsys.readouterr().out == answer
    assert (chat.settings.temperature, chat.settings.top_k) == (0.5, 7)
    chat.turn("help")
    assert "likeliest token (now 0.5)" in capsys.readouterr().out


def test_words_that_end_it(directory: Path) -> None:
    chat = chat_on(directory)
    assert not any(chat.turn(word) for word in ("quit", "exit", "/quit", "/exit", " quit "))
    assert chat.turn("quit now")


def test_the_oldest_text_makes_room(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    chat = chat_on(directory, max_tokens=20)
    bos = chat.engine.encode("")
    chat.turn("abcdefghijklmnopqrstuvwxyz")  # 27 tokens, 14 leave room for 6
    shown = capsys.readouterr()
    assert "(the oldest 13 tokens no longer fit into the context of 20 and are dropped)" in shown.err
    expected = Engine(load(directory)).generate([[*bos, *b"nopqrstuvwxyz"]], max_tokens=6)[0]
    assert shown.out == expected.text + "\n"
    for _ in range(4):
        chat.turn("abc")
        assert len(chat.ids) <= 20
        assert chat.ids[:1] == bos


def test_a_stop_token_ends_the_text(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    free = Engine(load(directory)).generate(["ab"], max_tokens=6)[0].ids
    stop = free[4]
    chat = chat_on(directory, Request(prompt_ids=[], max_tokens=6, stop_ids={stop}))
    chat.turn("ab")
    shown = capsys.readouterr()
    assert shown.out == chat.engine.tokenizer.decode(free[: free.index(stop)]) + "\n"
    assert "the model ended its text" in shown.err
    assert chat.ids == []


def test_ctrl_c_stops_the_answer_and_keeps_what_is_written(
    capsys: pytest.CaptureFixture[str], directory: Path
) -> None:
    chat = chat_on(directory)
    whole = continued(directory, "ab")
    calls = iter(range(100))

    def interrupt(*args: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    handle = chat.engine.model.register_forward_pre_hook(interrupt)
    chat.turn("ab")
    handle.remove()
    first = capsys.readouterr().out.removesuffix("\n")
    assert first == whole[:3]
    assert len(chat.ids) == 3 + 3
    chat.turn("")
    assert len(chat.ids) == 3 + 3 + 6


def test_one_shot_prints_the_answer_alone(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    assert main([str(directory), "-p", "ab", "--max-tokens=6", "--temperature=0"]) == 0
    assert capsys.readouterr().out == continued(directory, "ab") + "\n"


def test_a_pipe_gets_answers_and_no_prompts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\nclear\nab\nquit\nnever"))
    assert main([str(directory), "--max-tokens=6", "--temperature=0"]) == 0
    answer = continued(directory, "ab")
    assert capsys.readouterr().out == f"{answer}\n(new text)\n{answer}\n"


def test_wrong_settings_are_told_before_anything_is_loaded() -> None:
    with pytest.raises(RequestError, match=r"temperature = -1\.0"):
        main(["nowhere", "--temperature=-1"])


class Screen:
    """A command on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.end, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=own_terminal,
        )
        os.close(terminal)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What was shown since the last call, up to `text`."""
        assert self.comes(text, seconds), f"no {text!r} in {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def comes(self, text: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while text not in self.shown and time.monotonic() < deadline:
            if select.select([self.end], [], [], 0.2)[0]:
                self.shown += os.read(self.end, 4096).decode(errors="replace")
        return text in self.shown

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())


def own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where these tests run in a shell's background


def test_a_terminal_streams_and_obeys_ctrl_c_and_ctrl_d(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 1000000')
    )
    screen = Screen(
        sys.executable, "-m", "nanovl", "chat", str(directory), "--max-tokens=400000", "--temperature=0"
    )
    try:
        screen.wait_for("base model: it continues your text.")
        screen.wait_for("> ")
        screen.type("import os\n")
        screen.wait_for("import os\r\n")
        while len(screen.shown) < 20:  # the answer comes while it is written
            screen.shown += os.read(screen.end, 4096).decode(errors="replace")
        screen.type("\x03")
        screen.wait_for("> ")
        screen.type("half a line")
        screen.wait_for("half a line")
        screen.type("\x03")
        while not screen.comes("> ", 1):  # Python overlooks a signal in the moment before readline waits
            screen.type("\x03")
        screen.type("\x04")
        assert screen.process.wait(60) == 0
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.end)
