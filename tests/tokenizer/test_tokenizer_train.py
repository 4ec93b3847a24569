"""Both trainers on real text: the same merges, files that load, and clear words where they cannot do it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovl.errors import ConfigError, DataError
from nanovl.tokenizer.bpe import Tokenizer, load_tokenizer
from nanovl.tokenizer.train import cap_characters, merges_of, train_tokenizer

Trainer = Literal["rustbpe", "tokenizers"]
both = pytest.mark.parametrize("trainer", ["rustbpe", "tokenizers"])
ALL = 10**9


@both
def test_first_merges_by_hand(trainer: Trainer) -> None:
    """Counts: "ab" 5, then "ab"+"c" 3, then " "+"x" and "x"+"y" 2 each: the lower ids go first."""
    found = train_tokenizer(
        ["abc", "abc", "abc", "ab", "ab", "1 xy", "1 xy"], 265 + 4, trainer=trainer, **caps()
    )
    assert found.merges == [(b"a", b"b"), (b"ab", b"c"), (b" ", b"x"), (b" x", b"y")]
    assert found.vocab_size == 269


def caps(characters: int = ALL, document: int = ALL) -> dict[str, int]:
    return {"max_characters": characters, "document_characters": document}


@both
def test_result_is_saved_and_loaded(trainer: Trainer, corpus: list[str], tmp_path: Path) -> None:
    found = train_tokenizer(corpus[:20], 600, trainer=trainer, **caps())
    found.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, Tokenizer)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.vocab_size == 600 == library.get_vocab_size()
    ids = library.encode(corpus[30], add_special_tokens=False).ids
    assert loaded.encode(corpus[30]) == found.encode(corpus[30]) == ids


def test_trainers_learn_the_same_merges(corpus: list[str], tokenizer: Tokenizer) -> None:
    other = train_tokenizer(corpus, tokenizer.vocab_size, trainer="tokenizers", **caps())
    assert other.merges == tokenizer.merges
    assert other.hash() == tokenizer.hash()


@given(texts=st.lists(st.text(st.sampled_from("aab \n1é!'s"), max_size=30), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_trainers_agree_to_the_last_merge_of_any_text(texts: list[str]) -> None:
    """Down to pairs seen once; the largest vocabulary is the one that the error names."""
    with pytest.raises(ConfigError, match="merges") as raised:
        train_tokenizer(texts, 1000, trainer="rustbpe", **caps())
    largest = int(str(raised.value).split("use ")[1].split()[0])
    one, other = (
        train_tokenizer(texts, largest, trainer=trainer, **caps()) for trainer in ("rustbpe", "tokenizers")
    )
    assert one.merges == other.merges
    with pytest.raises(ConfigError, match=f"use {largest} or less"):
        train_tokenizer(texts, largest + 1, trainer="tokenizers", **caps())


@both
def test_too_little_text_names_the_largest_vocabulary(trainer: Trainer) -> None:
    with pytest.raises(
        ConfigError, match=r"the text holds only 2 of the 735 merges; use 267 or less, or more text"
    ):
        train_tokenizer(["abc"], 1000, trainer=trainer, **caps())
    assert train_tokenizer(["abc"], 267, trainer=trainer, **caps()).encode("abc") == [257]
    assert train_tokenizer([], 265, trainer=trainer, **caps()).vocab_size == 265


@both
def test_odd_unicode_does_not_stop_it(trainer: Trainer) -> None:
    odd = "a\ud800\udfff\udc00 \x00\ufeff\U0010ffff e\u0301\u200d\n"
    found = train_tokenizer([odd, "", odd], 280, trainer=trainer, **caps())
    assert found.decode(found.encode("\x00\U0010ffff")) == "\x00\U0010ffff"


def test_a_document_of_a_million_spaces_does_not_overflow_the_regex() -> None:
    """Pairs: 1,200,000 of spaces, then 700,000 "xy" behind them."""
    text = " " * 1_200_000 + "xy" * 700_000
    found = train_tokenizer([text], 267, trainer="rustbpe", **caps())
    assert found.merges == [(b" ", b" "), (b"x", b"y")]


@both
def test_an_error_of_the_texts_comes_through(trainer: Trainer) -> None:
    def broken() -> Iterator[str]:
        yield "text"
        raise DataError("row 3 is broken")

    with pytest.raises(DataError, match="row 3 is broken"):
        train_tokenizer(broken(), 300, trainer=trainer, **caps())


def test_caps() -> None:
    assert list(cap_characters(["abcdef", "gh", "ijkl", "mn"], 8, 4)) == ["abcd", "gh", "ij"]
    endless = iter(lambda: "abcd", None)
    assert sum(map(len, cap_characters(endless, 10, 3))) == 10


def test_caps_reach_the_trainer() -> None:
    one = train_tokenizer(["abab" * 9, "abab", "cd"], 267, trainer="rustbpe", **caps(40, 4))
    assert one.merges == [(b"a", b"b"), (b"ab", b"ab")]
    with pytest.raises(ConfigError, match=r"only 2 of the 6 merges"):
        train_tokenizer(["abab", "cdcd"], 271, trainer="rustbpe", **caps(4))


def test_a_vocabulary_below_the_bytes_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size = 264: 256 bytes and 9 special tokens need 265"):
        train_tokenizer(["abc"], 264, trainer="rustbpe", **caps())


def test_a_missing_trainer_is_an_error_that_names_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(ConfigError, match=r'not installed .* or set tokenizer.trainer = "tokenizers"'):
        train_tokenizer(["abc"], 266, trainer="rustbpe", **caps())
    assert train_tokenizer(["abc"], 266, trainer="tokenizers", **caps()).merges == [(b"a", b"b")]


def test_pairs_are_found_again_from_the_tokens(tokenizer: Tokenizer) -> None:
    assert merges_of(list(tokenizer.ranks)) == tokenizer.merges
    with pytest.raises(ValueError, match=r"token 256 .* cannot be joined"):
        merges_of([*(bytes([byte]) for byte in range(256)), b"abc"])
