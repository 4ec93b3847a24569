"""A tokenizer.json of another project (Qwen, Llama, ...), through the `tokenizers` library: exact, slower."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from nanovl.errors import ConfigError
from nanovl.tokenizer.files import CONFIG_FILE, TOKENIZER_FILE, bytes_of, parse_object, read_text, write_files
from nanovl.tokenizer.text import valid_unicode

CARRIED = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
"""Files beside the two that are read: kept, since who loads the tokenizer elsewhere asks for them."""


class ForeignTokenizer:
    """Same methods as Tokenizer; `bos_id` is None where tokenizer_config.json names no bos_token.

    Special tokens are read from text on request only. Added tokens that the file does not call special, such
    as Qwen's `<think>`, always are, as in `transformers`.
    """

    def __init__(self, tokenizer_json: str, config_json: str, folder: Path) -> None:
        """From the texts of both files, "" for a config that is not there; `folder` is for errors."""
        file = folder / TOKENIZER_FILE
        self._texts = {TOKENIZER_FILE: tokenizer_json} | ({CONFIG_FILE: config_json} if config_json else {})
        self._data = parse_object(tokenizer_json, file)
        self._library = _from_json(self._data, tokenizer_json, file)
        self._bytes = _bytes_of_ids(self._data, self._library, file)
        self.vocab_size = max(self._bytes, default=-1) + 1
        added = sorted(self._library.get_added_tokens_decoder().items())
        self.special_ids = {token.content: i for i, token in added if token.special}
        self.bos_id = _bos_id(parse_object(config_json or "{}", folder / CONFIG_FILE), self._library, folder)

    @classmethod
    def load(cls, folder: str | Path) -> ForeignTokenizer:
        """The tokenizer in `folder`. Raises ConfigError naming the file that is missing or not understood."""
        config = Path(folder) / CONFIG_FILE
        config_json = read_text(config) if config.exists() else ""
        found = cls(read_text(Path(folder) / TOKENIZER_FILE), config_json, Path(folder))
        for file in (Path(folder) / name for name in CARRIED):
            if file.exists():
                found._texts[file.name] = read_text(file)
                if file.suffix == ".json":
                    parse_object(found._texts[file.name], file)
        return found

    def save(self, folder: str | Path) -> None:
        """Write the files as they were read."""
        write_files(Path(folder), self._texts)

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of `text`, after bos if `bos`; `parse_special` reads special tokens in the text too.

        Raises ConfigError for `bos` where the tokenizer has none. A lone surrogate becomes U+FFFD.
        """
        library = self._parsing_library if parse_special else self._library
        ids: list[int] = library.encode(valid_unicode(text), add_special_tokens=False).ids
        return [self._require_bos(), *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, threads: int = 1) -> list[list[int]]:
        """`encode` of each text; with `threads` above 1 on the library's own pool, one thread a core."""
        if threads == 1:
            return [self.encode(text, bos=bos) for text in texts]
        start = [self._require_bos()] if bos else []
        found = self._library.encode_batch_fast([valid_unicode(t) for t in texts], add_special_tokens=False)
        return [start + one.ids for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out, U+FFFD for what is not UTF-8. Raises as decode_bytes.

        Many of these tokenizers normalize Unicode, so it need not be the very text that was encoded.
        """
        self._check(ids)
        text: str = self._library.decode(ids, skip_special_tokens=False)
        return text

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`, special tokens spelled out. Raises ValueError for an id outside the vocabulary."""
        self._check(ids)
        return b"".join(self._bytes[i] for i in ids)

    def token_bytes(self) -> NDArray[np.int32]:
        """Bytes of text that each id stands for, [vocab_size]; 0 for special tokens and unused ids."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for i, token in self._bytes.items():
            lengths[i] = len(token)
        lengths[list(self.special_ids.values())] = 0
        return lengths

    def hash(self) -> str:
        """sha256, in hex, over all that decides the ids."""
        deciding = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")
        parts = {part: self._data.get(part) for part in deciding} | {"bos_id": self.bos_id}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _parsing_library(self) -> Any:
        """A second copy, because reading special tokens is a state of the library's object, not of a call."""
        library = tokenizers.Tokenizer.from_str(self._library.to_str())
        library.encode_special_tokens = False
        return library

    def _require_bos(self) -> int:
        if self.bos_id is None:
            raise ConfigError(
                "tokenizer.path: this tokenizer has no token that begins a document; name one of its special "
                f"tokens as bos_token in {CONFIG_FILE}: {', '.join(self.special_ids) or 'it has none'}"
            )
        return self.bos_id

    def _check(self, ids: Sequence[int]) -> None:
        if any(i not in self._bytes for i in ids):  # the library would leave them out without a word
            raise unknown_id(ids, self._bytes)


def unknown_id(ids: Sequence[int], known: Container[int]) -> ValueError:
    """The error for `ids` of which one is not `known`."""
    wrong = next(i for i in ids if i not in known)
    return ValueError(
        f"token id {wrong} stands for nothing in this tokenizer; it comes from another one, or from a model "
        "with a larger vocab_size: sample only ids below the tokenizer's"
    )


def _from_json(data: dict[str, Any], text: str, file: Path) -> Any:
    """The library's tokenizer, which cuts and pads nothing and reads no special tokens from text."""
    model = data.get("model")
    kind = model.get("type", "BPE" if "merges" in model else None) if isinstance(model, dict) else None
    if kind != "BPE":
        raise ConfigError(
            f"{file}: its model is of type {kind!r}; name a tokenizer whose model is of type 'BPE'"
        )
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises the base class itself
        raise ConfigError(f"{file}: the tokenizers library refuses it ({error}); copy it again") from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return library


def _bytes_of_ids(data: dict[str, Any], library: Any, file: Path) -> dict[int, bytes]:
    """What each id adds to the text, as the file's decoder has it."""
    decoder = data.get("decoder") or {}
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = {_kind(step) for step in steps}
    spelled: Callable[[str], bytes]
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        spelled = _byte_level
    elif "ByteFallback" in kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        spelled = _byte_fallback(steps)
    else:
        raise ConfigError(
            f"{file}: its decoder ({', '.join(sorted(kinds))}) does not tell the bytes of a token; name a "
            "tokenizer that decodes by ByteLevel or ByteFallback"
        )
    table = {i: spelled(token) for token, i in library.get_vocab(with_added_tokens=False).items()}
    return table | {i: token.content.encode() for i, token in library.get_added_tokens_decoder().items()}


def _kind(step: dict[str, Any]) -> str:
    """Type of a decoder's step; replacing by regex is a type of its own."""
    kind = str(step.get("type"))
    return "Replace by Regex" if kind == "Replace" and "Regex" in step["pattern"] else kind


def _byte_level(token: str) -> bytes:
    try:
        return bytes_of(token)
    except KeyError:  # the library, too, takes a token with a character outside the table as plain text
        return token.encode()


def _byte_fallback(steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    """SentencePiece's spelling: `<0x0A>` is a byte, all else text in which a mark, U+2581, is the space."""
    marks = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]

    def spelled(token: str) -> bytes:
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for mark, text in marks:
            token = token.replace(mark, text)
        return token.encode()

    return spelled


def _bos_id(config: dict[str, Any], library: Any, folder: Path) -> int | None:
    token = config.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return None
    found: int | None = library.token_to_id(content)
    if found is None:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: bos_token {content!r} is not in {TOKENIZER_FILE}; correct it"
        )
    return found
