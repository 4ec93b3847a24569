"""Text that grows by tokens, in pieces that never cut a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class DecodesBytes(Protocol):
    """The part of a tokenizer that turns ids back into bytes."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


class TextStream:
    """Ids in, text out; bytes of an unfinished UTF-8 character are held back until it is whole.

    All pieces together are the text of all ids, with U+FFFD for bytes that are not UTF-8.
    """

    def __init__(self, tokenizer: DecodesBytes) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; may be empty."""
        return self._decoder.decode(self.tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is still held back: U+FFFD where the ids end inside a character."""
        return self._decoder.decode(b"", final=True)


def decode_text(tokenizer: DecodesBytes, ids: Sequence[int]) -> str:
    """The text of `ids`, equal to a stream's pieces.

    Unlike `tokenizer.decode` it keeps a space at the beginning, which some tokenizers drop as their own.
    """
    return tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
