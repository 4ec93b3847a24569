"""Long whitespace is cut where the split pattern cuts it; the same text must give the same ids either way."""

from __future__ import annotations

import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovl.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, _takes_newlines
from nanovl.tokenizer.text import WHITESPACE, Segment, cut_whitespace, long_whitespace, valid_unicode

spaces = st.text(st.sampled_from(" \n\r\t\u3000\u2028"), min_size=1, max_size=9)
words = st.sampled_from(["a", "Z9", "1", "!", "'", "'s", "é", "\u0301", "漢", "🤖", "_", "", "\x1c"])


@given(
    text=st.lists(st.tuples(words, spaces, words), max_size=5).map(lambda t: "".join("".join(x) for x in t))
)
@example("!\n\n \na")
@example("a\n\n \na")
@example("!\n\n\n")
@example(" \n a")
@example("  ")
@settings(max_examples=150, deadline=None)
def test_segments_split_as_the_whole_text(text: str) -> None:
    segments = cut_whitespace(text, long_whitespace(text, length=2), _takes_newlines)
    assert "".join(segment.text for segment in segments) == text
    assert [p for s in segments for p in ([s.text] if s.whole else pieces(s.text))] == pieces(text)


def pieces(text: str) -> list[str]:
    """`text` as the pattern splits it: every part of `text` is a token, so each piece becomes one."""
    data = text.encode()
    parts = {data[i:j] for i in range(len(data)) for j in range(i + 2, len(data) + 1)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {part: 256 + i for i, part in enumerate(sorted(parts, key=len))}
    encoding = tiktoken.Encoding("pieces", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(i).decode() for i in encoding.encode_ordinary(text)]


def test_segments_by_hand() -> None:
    text = "hi!\n\n \t\n   a \n"
    assert long_whitespace(text, length=4) == [(3, 11), (12, 14)]
    assert cut_whitespace(text, [(3, 11)], lambda char: char == "!") == [
        Segment("hi!\n\n", whole=False),
        Segment(" \t\n", whole=True),
        Segment("  ", whole=True),
        Segment(" a \n", whole=False),
    ]


def test_long_runs_are_found_wherever_they_start() -> None:
    for start in range(25):
        for length in range(10, 25):
            text = "x" * start + "\u3000" * length + "y" * 7
            assert long_whitespace(text, length=10) == [(start, start + length)]
    assert long_whitespace("xxxx " * 1000, length=10) == []


def test_whitespace_is_what_the_pattern_takes_for_it() -> None:
    """Of two spaces before a letter the second goes with it; two newlines stay, as any other two do."""
    candidates = (
        {chr(c) for c in range(0x10000) if chr(c).isspace()}
        | set(WHITESPACE)
        | set("\u180e\u200b\u2060\ufeff")
    )
    found = {c for c in candidates if pieces(f"{c}{c}a") == [c, f"{c}a"]}
    assert found | {"\n", "\r"} == set(WHITESPACE)


def test_a_million_spaces_encode(tokenizer: Tokenizer) -> None:
    """tiktoken's regex alone panics on this; by its pieces the run is all but the last space."""
    text = "x" + " " * 1_200_001 + "y"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[-len(tokenizer.encode(" y")) :] == tokenizer.encode(" y")
    assert len(ids) < len(text) / 8


def test_lone_surrogates_are_replaced_and_pairs_joined() -> None:
    assert valid_unicode("a\ud83e\udd16\udc00\ud800") == "a🤖\ufffd\ufffd"
    assert valid_unicode("ça\x00") == "ça\x00"
