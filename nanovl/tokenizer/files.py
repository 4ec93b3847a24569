"""The files of a tokenizer folder: Hugging Face's JSON, in which each byte is one printable character."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nanovl.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
PICKLE_FILE = "tokenizer.pkl"
"""nanochat's own."""


def _byte_to_char() -> dict[int, str]:
    """GPT-2's table: bytes that Latin-1 prints stand for themselves, the others count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def chars_of(token: bytes) -> str:
    """`token` as tokenizer.json spells it."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def bytes_of(chars: str) -> bytes:
    """The bytes that tokenizer.json spells as `chars`. Raises KeyError for a character that spells none."""
    return bytes(CHAR_TO_BYTE[char] for char in chars)


def read_text(file: Path) -> str:
    """The contents of a tokenizer's file. Raises ConfigError naming it."""
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{file}: no such file; copy the tokenizer's files there, or name a folder that holds one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); name a folder with a readable one") from None


def parse_object(text: str, file: Path) -> dict[str, Any]:
    """The JSON object in `text`, which came from `file`. Raises ConfigError naming the file."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{file}: not valid JSON ({error}); copy it again, or train a new tokenizer"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds a {type(data).__name__}, not an object; name a tokenizer's folder")
    return data


def write_files(folder: Path, texts: dict[str, str]) -> None:
    """Write name -> text into `folder`; a new folder appears with all of them in it, or not at all."""
    folder = folder.resolve()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, text in texts.items():
        with (partial / name).open("w", encoding="utf-8", newline="\n") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
    if not folder.exists():
        partial.rename(folder)
        return
    for name in texts:
        (partial / name).replace(folder / name)
    partial.rmdir()
