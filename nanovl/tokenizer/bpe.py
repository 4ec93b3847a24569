"""Byte-level BPE with nanochat's split pattern and special tokens; what comes out is exactly what went in.

Ids: the 256 bytes, then one for each merge in the order learned, then the special tokens. Text is never read
for special tokens: "<|bos|>" in it is seven bytes like any others. They enter a sequence by their ids alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

from nanovl.errors import ConfigError
from nanovl.tokenizer.files import (
    CONFIG_FILE,
    PICKLE_FILE,
    TOKENIZER_FILE,
    bytes_of,
    chars_of,
    parse_object,
    read_text,
    write_files,
)
from nanovl.tokenizer.foreign import ForeignTokenizer, unknown_id
from nanovl.tokenizer.text import cut_whitespace, long_whitespace, valid_unicode

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
"""The last nine ids of the vocabulary, in this order. A document is `<|bos|>` and its text, no end."""

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""GPT-4's pattern with numbers cut after two digits, not three; no merge crosses from one piece to the next.
`cut_whitespace` follows what it does with whitespace."""


class Tokenizer:
    """The tokenizer that nanovl trains; encodes through tiktoken."""

    def __init__(self, merges: Sequence[tuple[bytes, bytes]]) -> None:
        """From `merges` in the order learned. Raises ValueError for one whose parts no earlier one made."""
        self.merges = list(merges)
        self.ranks = _ranks(self.merges)
        self.vocab_size = len(self.ranks) + len(SPECIAL_TOKENS)
        self.special_ids = {name: len(self.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos_id = self.special_ids["<|bos|>"]
        self._encoding = tiktoken.Encoding(
            "nanovl", pat_str=SPLIT_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_ids
        )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer saved in `folder`. Raises ConfigError naming the file, also for a foreign one."""
        found = load_tokenizer(folder)
        if not isinstance(found, cls):
            raise ConfigError(
                f"{Path(folder) / TOKENIZER_FILE}: not written by nanovl; read it with load_tokenizer"
            )
        return found

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `transformers.AutoTokenizer` loads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",  # of a chat; a document ends where the next begins
            "clean_up_tokenization_spaces": False,
        }
        files = {TOKENIZER_FILE: _tokenizer_json(self.merges), CONFIG_FILE: config}
        texts = {name: json.dumps(data, ensure_ascii=False, indent=1) + "\n" for name, data in files.items()}
        write_files(Path(folder), texts)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`, after `<|bos|>` if `bos`. A lone surrogate, which is no Unicode, becomes U+FFFD."""
        text = valid_unicode(text)
        runs = long_whitespace(text)
        ids = self._encode_segments(text, runs) if runs else self._encoding.encode_ordinary(text)
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on `threads` threads."""
        if threads == 1:
            return [self.encode(text, bos=bos) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text, bos=bos), texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out, U+FFFD for what is not UTF-8. Raises as decode_bytes."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`, special tokens spelled out. Raises ValueError for an id outside the vocabulary."""
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            raise unknown_id(ids, range(self.vocab_size)) from None

    def token_bytes(self) -> NDArray[np.int32]:
        """Bytes of text that each id stands for, [vocab_size]; 0 for the special tokens."""
        return np.array([len(token) for token in self.ranks] + [0] * len(SPECIAL_TOKENS), dtype=np.int32)

    def hash(self) -> str:
        """sha256, in hex, over all that decides the ids: merges, split pattern, special tokens."""
        parts = {
            "merges": [[left.hex(), right.hex()] for left, right in self.merges],
            "pattern": SPLIT_PATTERN,
            "special_tokens": SPECIAL_TOKENS,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _encode_segments(self, text: str, runs: list[tuple[int, int]]) -> list[int]:
        ids: list[int] = []
        for segment in cut_whitespace(text, runs, _takes_newlines):
            encoding = self._whole_encoding if segment.whole else self._encoding
            ids += encoding.encode_ordinary(segment.text)
        return ids

    @cached_property
    def _whole_encoding(self) -> tiktoken.Encoding:
        """The same merges over text that is one piece."""
        return tiktoken.Encoding(
            "nanovl_whole", pat_str="(?s).+", mergeable_ranks=self.ranks, special_tokens={}
        )


AnyTokenizer: TypeAlias = Tokenizer | ForeignTokenizer
"""What every command takes: both have the same methods, but `bos_id` of a foreign one may be None."""


def load_tokenizer(folder: str | Path) -> AnyTokenizer:
    """The tokenizer in `folder`: ours where its file is as we write it, else one of the `tokenizers` library.

    A folder of nanochat has a tokenizer.pkl instead. Raises ConfigError naming the file that is missing or not
    understood.
    """
    file = Path(folder) / TOKENIZER_FILE
    if not file.exists() and (pickled := Path(folder) / PICKLE_FILE).is_file():
        from nanovl.tokenizer.nanochat_pickle import read_pickled

        return read_pickled(pickled)
    merges = _own_merges(parse_object(read_text(file), file))
    return ForeignTokenizer.load(folder) if merges is None else Tokenizer(merges)


def _ranks(merges: list[tuple[bytes, bytes]]) -> dict[bytes, int]:
    """Token -> id, without the special tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for number, (left, right) in enumerate(merges):
        if left not in ranks or right not in ranks or left + right in ranks:
            raise ValueError(
                f"merge {number}, {left!r} + {right!r}, does not make a new token of two known ones"
            )
        ranks[left + right] = len(ranks)
    return ranks


def _tokenizer_json(merges: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    ranks = _ranks(merges)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = enumerate(SPECIAL_TOKENS, start=len(ranks))
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in specials],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _bos_first(len(ranks)),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {chars_of(token): rank for token, rank in ranks.items()},
            "merges": [[chars_of(left), chars_of(right)] for left, right in merges],
        },
    }


def _bos_first(bos_id: int) -> dict[str, Any]:
    """What the library does to whole texts, as our engine does; not to chats, whose template has `<|bos|>` itself."""
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    single, other = [bos, {"Sequence": {"id": "A", "type_id": 0}}], {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, bos, other],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [bos_id], "tokens": ["<|bos|>"]}},
    }


def _own_merges(data: dict[str, Any]) -> list[tuple[bytes, bytes]] | None:
    """The merges of a tokenizer.json in which all that decides ids and text is as we write it, else None."""
    try:
        merges = [(bytes_of(left), bytes_of(right)) for left, right in data["model"]["merges"]]
        ours = _tokenizer_json(merges)
    except (KeyError, TypeError, ValueError):
        return None
    deciding = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")
    return merges if all(data.get(part) == ours[part] for part in deciding) else None


def _takes_newlines(char: str) -> bool:
    """Whether the split pattern puts newlines into the piece of `char`; the regex itself is asked."""
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    return len(split.pre_tokenize_str(f"{char}\n")) == 1
