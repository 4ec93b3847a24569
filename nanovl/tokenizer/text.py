"""Text as the tokenizers' regexes can take it: valid Unicode, no whitespace that overflows their stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_SPACES = "".join(map(chr, [*range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]))
WHITESPACE = f"\t\n\v\f\r \x85\xa0\u1680{_SPACES}"
r"""Unicode's White_Space, which is `\s` in the split pattern (str.isspace has U+001C to U+001F as well)."""

LONG_WHITESPACE = 100_000
"""Characters of a whitespace run that is cut by hand: tiktoken's and rustbpe's regex fails near a million."""


class Segment(NamedTuple):
    """A stretch of text; `whole` = it is one piece of the split pattern, else the pattern splits it."""

    text: str
    whole: bool


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and every lone surrogate replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def long_whitespace(text: str, length: int = LONG_WHITESPACE) -> list[tuple[int, int]]:
    """(start, end) of every whitespace run of `length` (at least 2) characters, and of some shorter ones."""
    stride = length // 2  # a run of `length` holds a whole window of half its size, wherever it starts
    runs: list[tuple[int, int]] = []
    end = 0
    for at in range(0, len(text) - stride + 1, stride):
        if at < end or text[at] not in WHITESPACE or text[at : at + stride].strip(WHITESPACE):
            continue
        start = end + len(text[end:at].rstrip(WHITESPACE))
        end = len(text) - len(text[at:].lstrip(WHITESPACE))
        runs.append((start, end))
    return runs


def cut_whitespace(
    text: str, runs: list[tuple[int, int]], takes_newlines: Callable[[str], bool]
) -> list[Segment]:
    """`text` cut at its whitespace `runs` so that the segments split into the pieces that all of it would.

    What the pattern does inside a run is known: a piece of punctuation before it takes the newlines it begins
    with (`takes_newlines` of the character before the run says whether that is one), then one piece goes to
    the last newline, then one to the end, less the last character where text follows. These two can be long.
    """
    segments: list[Segment] = []
    begin = 0
    for start, end in runs:
        run = text[start:end]
        newlines = len(run) - len(run.lstrip("\r\n"))
        head = start + newlines if newlines and start and takes_newlines(text[start - 1]) else start
        middle = max(head, 1 + max(text.rfind("\n", head, end), text.rfind("\r", head, end)))
        tail = end if end == len(text) else max(middle, end - 1)
        segments.append(Segment(text[begin:head], whole=False))
        segments.append(Segment(text[head:middle], whole=True))
        segments.append(Segment(text[middle:tail], whole=True))
        begin = tail
    segments.append(Segment(text[begin:], whole=False))
    return [segment for segment in segments if segment.text]
