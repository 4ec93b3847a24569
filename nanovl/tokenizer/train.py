"""Learning the merges of a tokenizer from text, with either of two libraries; they learn the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Literal

from nanovl.errors import ConfigError
from nanovl.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanovl.tokenizer.files import BYTE_TO_CHAR, bytes_of
from nanovl.tokenizer.text import LONG_WHITESPACE, valid_unicode

Merge = tuple[bytes, bytes]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    trainer: Literal["rustbpe", "tokenizers"],
    max_characters: int,
    document_characters: int,
) -> Tokenizer:
    """A tokenizer of `vocab_size` ids, special tokens included, learned from the beginning of `texts`.

    Raises ConfigError where the vocabulary is smaller than the bytes and special tokens, where the text holds
    too few merges for it, and where the trainer is not installed. An error that `texts` raises comes through.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"tokenizer.vocab_size = {vocab_size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"{smallest}; use that or more"
        )
    wanted = vocab_size - smallest
    learn = _learn_with_rustbpe if trainer == "rustbpe" else _learn_with_tokenizers
    merges = learn(_pieces(cap_characters(texts, max_characters, document_characters)), wanted)
    if len(merges) < wanted:
        raise ConfigError(
            f"tokenizer.vocab_size = {vocab_size}: the text holds only {len(merges)} of the {wanted} merges; "
            f"use {smallest + len(merges)} or less, or more text (data.sources, tokenizer.train_characters)"
        )
    return Tokenizer(merges)


def cap_characters(texts: Iterable[str], max_characters: int, document_characters: int) -> Iterator[str]:
    """The beginning of every text, `document_characters` at most, until there are `max_characters` in all."""
    left = max_characters
    for text in texts:
        begin = text[: min(document_characters, left)]
        left -= len(begin)
        yield begin
        if left <= 0:
            return


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """`texts` as valid Unicode, in pieces too short for their whitespace to overflow a trainer's regex."""
    for text in texts:
        for start in range(0, len(text), LONG_WHITESPACE):
            yield valid_unicode(text[start : start + LONG_WHITESPACE])


def _learn_with_rustbpe(texts: Iterator[str], wanted: int) -> list[Merge]:
    try:
        import rustbpe
    except ImportError as error:
        raise ConfigError(
            f'tokenizer.trainer = "rustbpe": it is not installed ({error}); install rustbpe, or set '
            'tokenizer.trainer = "tokenizers", which learns the same merges in more time'
        ) from None
    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(texts, 256 + wanted, pattern=SPLIT_PATTERN)
    by_rank = sorted(learner.get_mergeable_ranks(), key=lambda entry: entry[1])
    return merges_of([bytes(token) for token, _ in by_rank])


def _learn_with_tokenizers(texts: Iterator[str], wanted: int) -> list[Merge]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=256 + wanted,
        min_frequency=1,
        show_progress=False,
        # "special" only so that a byte's id is its value: ids decide between equal counts, as in rustbpe
        special_tokens=[BYTE_TO_CHAR[byte] for byte in range(256)],
    )
    learner.train_from_iterator(texts, trainer)
    pairs = json.loads(learner.to_str())["model"]["merges"]
    return [(bytes_of(left), bytes_of(right)) for left, right in pairs]


def merges_of(tokens: list[bytes]) -> list[Merge]:
    """The pairs that were joined into `tokens`, which are in the order learned, the 256 bytes first.

    A token was joined from what its bytes become, by themselves, under the merges before it: in the training
    text these merges were done first, and none of them can have reached across the token's ends. Raises ValueError
    where they do not make it.
    """
    ids: dict[tuple[int, int], int] = {}
    merges = []
    for number, token in enumerate(tokens[256:], start=256):
        parts = list(token)
        while len(parts) > 2:
            pair = min(pairwise(parts), key=lambda pair: ids.get(pair, number))
            if pair not in ids:
                raise ValueError(f"token {number} ({token!r}) cannot be joined from the tokens before it")
            parts = _join(parts, pair, ids[pair])
        ids[parts[0], parts[1]] = number
        merges.append((tokens[parts[0]], tokens[parts[1]]))
    return merges


def _join(parts: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`parts` with `new` for every `pair`, from left to right."""
    joined: list[int] = []
    at = 0
    while at < len(parts):
        found = tuple(parts[at : at + 2]) == pair
        joined.append(new if found else parts[at])
        at += 2 if found else 1
    return joined
