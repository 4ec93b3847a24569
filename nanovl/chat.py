"""`nanovl chat`: write with a model in the terminal.

A base model knows no turns: it continues your text, and the text grows by what you and it write in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nanovl.errors import NanovlError
from nanovl.generate import add_sampling_arguments, check_sampling_arguments
from nanovl.inference.request import Request, check_request
from nanovl.log import Log, out

if TYPE_CHECKING:
    from nanovl.inference.engine import Engine

HELP = """\
  any text          the model goes on from it
  (empty line)      the model goes on from where it stopped
  /temperature X    0 = always the likeliest token (now {temperature:g})
  /topk K           draw from the K likeliest tokens; 0 = all (now {top_k})
  /clear            start a new text
  /quit             end; so does Ctrl-D. Ctrl-C stops the answer"""
WORDS = ("quit", "exit", "clear", "help")
"""Commands that also work without the slash."""


def main(argv: list[str]) -> int:
    """`nanovl chat PATH [-p TEXT]`. Raises NanovlError, and SystemExit(2) on a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="nanovl chat", description="Write with a model in the terminal.", allow_abbrev=False
    )
    parser.add_argument("path", help="run folder, checkpoint, Hugging Face directory, or nanochat's folder")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this one text and end")
    add_sampling_arguments(parser, max_tokens=256, temperature=0.8, top_k=50)
    args = parser.parse_args(argv)
    check_sampling_arguments(args)

    from nanovl.inference.engine import Engine
    from nanovl.inference.load import load

    engine = Engine(load(args.path, device=args.device, dtype=args.dtype), max_rows=1)
    settings = Request(
        prompt_ids=[],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=frozenset(engine.special_ids()),
    )
    chat = Chat(engine, settings, Log())
    if args.prompt is not None:
        chat.say(args.prompt)
        return 0
    if sys.stdin.isatty():
        out("base model: it continues your text. /help lists commands, /quit ends")
    for line in lines():
        if not chat.turn(line):
            break
    return 0


def lines() -> Iterator[str]:
    """What the user enters, until it ends; a terminal shows a prompt, and Ctrl-C there drops the line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  (gives input() history and editing)

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            out()
        except EOFError:
            out()
            return


@dataclass
class Chat:
    """A text that grows by turns."""

    engine: Engine
    settings: Request
    """Of every answer; its prompt is not used."""
    log: Log
    ids: list[int] = field(default_factory=list)
    """The text so far."""
    ends_line: bool = True
    """Whether the text so far ends with a line break, or is empty."""
    answers: int = 0
    """Given so far."""

    def turn(self, line: str) -> bool:
        """Obey a command or answer a text; returns whether to go on."""
        word, _, value = line.strip().partition(" ")
        if word in WORDS and not value:
            word = "/" + word
        if word in ("/quit", "/exit"):
            return False
        if word == "/clear":
            self.ids, self.ends_line = [], True
            out("(new text)")
        elif word == "/help":
            out(HELP.format(temperature=self.settings.temperature, top_k=self.settings.top_k))
        elif word == "/temperature":
            self._set("temperature", float, value)
        elif word == "/topk":
            self._set("top_k", int, value)
        elif word[:1] == "/" and word[1:].isalpha():
            out(f"no such command: {word}; /help lists them. A text that begins so needs a space before it")
        elif line or self.ids:
            self.say(line)
        return True

    def say(self, text: str) -> None:
        """Add `text` as a line of its own, and the model's answer, shown as it is made; Ctrl-C ends it."""
        from nanovl.inference.stream import TextStream

        tokenizer = self.engine.tokenizer
        assert tokenizer is not None, "a chat without a tokenizer"
        if not self.ids:
            self.ids = self.engine.encode(text)
        elif text:
            self.ids += tokenizer.encode(text if self.ends_line else "\n" + text)
        self._make_room()
        pieces, stream, ended = [""], TextStream(tokenizer), False
        # the same text entered again gets another sample
        events = self.engine.stream(replace(self.settings, prompt_ids=list(self.ids), sample=self.answers))
        self.answers += 1
        try:
            for event in events:
                ended = event.finish_reason == "stop"
                if ended:
                    break
                self.ids.append(event.token_id)
                pieces.append(stream.push([event.token_id]))
                out(pieces[-1], end="")
        except KeyboardInterrupt:
            pass
        finally:
            events.close()
        pieces.append(stream.finish())
        out(pieces[-1])
        self.ends_line = "".join(pieces).endswith("\n")
        if ended:
            self._note("the model ended its text; the next line begins a new one")
            self.ids, self.ends_line = [], True

    def _make_room(self) -> None:
        """Drop the oldest tokens where the text leaves too little of the context to answer in."""
        context = self.engine.max_tokens
        room = context - min(self.settings.max_tokens, context // 2)
        begin = self.engine.encode("")  # bos, where the tokenizer has one: it stays the first
        surplus = len(self.ids) - max(len(begin) + 1, room)
        if surplus > 0:
            self.ids = begin + self.ids[len(begin) + surplus :]
            self._note(
                f"the oldest {surplus} tokens no longer fit into the context of {context} and are dropped"
            )

    def _set(self, name: str, kind: type[int] | type[float], value: str) -> None:
        try:
            change: dict[str, Any] = {name: kind(value)}
            settings = replace(self.settings, prompt_ids=[0], **change)
            check_request(settings, context_tokens=1, vocab_size=1)
        except ValueError as error:
            why = error if isinstance(error, NanovlError) else f"{name} = {value!r}: wants a number"
            out(f"not changed: {why}")
            return
        self.settings = settings
        out(f"{name} is now {getattr(settings, name):g}")

    def _note(self, text: str) -> None:
        self.log.warn(f"({text})")
