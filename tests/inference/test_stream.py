from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanovl.inference.stream import TextStream, decode_text
from nanovl.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer(
    [(b"\xc3", b"\xa9"), (b"a", b"\xf0")]
)  # "é", and a letter with the first byte of an emoji


def test_a_character_waits_for_its_last_byte() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.push([i]) for i in b"x\xf0\x9f\x98\x80y"] == ["x", "", "", "", "😀", "y"]
    assert stream.finish() == ""


def test_whole_text_of_a_token_comes_before_its_open_bytes() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.push([257]), stream.push([0x9F]), stream.push([0x98, 0x80])] == ["a", "", "😀"]


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    stream = TextStream(TOKENIZER)
    assert stream.push([0xF0]) == ""
    assert stream.push(list(b"a")) == "\ufffda"
    assert (stream.push([0xE2]), stream.finish()) == ("", "\ufffd")


@given(st.lists(st.integers(0, 257), max_size=30))
def test_pieces_join_to_the_whole_text(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == decode_text(TOKENIZER, ids)
