"""nanochat's tokenizer.pkl: read without running anything of it, written as nanochat loads it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from nanovl.errors import ConfigError
from nanovl.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, load_tokenizer
from nanovl.tokenizer.nanochat_pickle import write_pickled

TEXT = "the cat and the hat, the rat; 12345 caf\u00e9 \U0001f600\n\n  the end"
MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"a", b"t"), (b"\xc3", b"\xa9")]


def ranks() -> dict[bytes, int]:
    return {bytes([i]): i for i in range(256)} | {a + b: 256 + i for i, (a, b) in enumerate(MERGES)}


def state(**changes: Any) -> dict[str, Any]:
    """What nanochat's Encoding is made of."""
    specials = {name: 256 + len(MERGES) + i for i, name in enumerate(SPECIAL_TOKENS)}
    made = {
        "name": "rustbpe",
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": ranks(),
        "special_tokens": specials,
    }
    return {**made, **changes}


def dump(folder: Path, value: Any, protocol: int = 4) -> Path:
    file = folder / "tokenizer.pkl"
    file.write_bytes(pickle.dumps(value, protocol))
    return file


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_ids_are_those_of_the_pickled_encoding(tmp_path: Path, protocol: int) -> None:
    encoding = tiktoken.Encoding(**state())
    dump(tmp_path, encoding, protocol)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, Tokenizer)
    assert ours.merges == MERGES
    assert ours.encode(TEXT) == encoding.encode_ordinary(TEXT)
    assert ours.vocab_size == encoding.n_vocab
    assert ours.special_ids == state()["special_tokens"]


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    file = dump(tmp_path, tiktoken.Encoding(**state()))
    write_pickled(Tokenizer(MERGES), tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.pkl").read_bytes() == file.read_bytes()
    token_bytes = torch.load(tmp_path / "again" / "token_bytes.pt", weights_only=True)
    assert token_bytes.dtype == torch.int32
    assert token_bytes.tolist() == [1] * 256 + [2, 3, 4, 2, 2] + [0] * 9


def test_a_tokenizer_json_beside_it_is_read_first(tmp_path: Path) -> None:
    Tokenizer(MERGES[:2]).save(tmp_path / "both")
    dump(tmp_path / "both", tiktoken.Encoding(**state()))
    assert load_tokenizer(tmp_path / "both").vocab_size == 256 + 2 + 9


class Touches:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.file}",))


class Keeps:
    """An object of a harmless class with code in its state."""

    def __init__(self, value: Any) -> None:
        self.value = value


def test_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    evil = Touches(tmp_path / "touched")
    for value in (evil, {"mergeable_ranks": evil}, Keeps(evil), [tiktoken.Encoding(**state()), evil]):
        dump(tmp_path, value)
        with pytest.raises(
            ConfigError, match=r"tokenizer\.pkl: not a pickled tiktoken\.Encoding alone.*asks for"
        ):
            load_tokenizer(tmp_path)
    # the admitted class called, and given a state, by hand: nothing of tiktoken runs
    for program in (
        b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93\x8c\x04gpt2\x85R.",
        b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93\x8c\x04gpt2b.",
        b"\x80\x04cbuiltins\neval\n\x8c\x011\x85R.",
    ):
        (tmp_path / "tokenizer.pkl").write_bytes(program)
        with pytest.raises(ConfigError, match=r"not a pickled tiktoken\.Encoding alone"):
            load_tokenizer(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_an_encoding_by_name_is_not_fetched(tmp_path: Path) -> None:
    program = b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b."
    (tmp_path / "tokenizer.pkl").write_bytes(program)
    with pytest.raises(ConfigError, match=r"names tiktoken's encoding 'gpt2' and holds no tokens of it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 30, 1000])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    file = dump(tmp_path, tiktoken.Encoding(**state()))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"tokenizer\.pkl: not a pickled tiktoken\.Encoding alone"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pat_str": r"\w+|\W+"},
            r"splits text by .*, unlike any that nanochat trains; save it with transformers",
        ),
        ({"special_tokens": {"<|bos|>": 261}}, r"has the special tokens \{'<\|bos\|>': 261\}"),
        ({"mergeable_ranks": {**ranks(), b"zz": 300}}, "has numbers with no token"),
        ({"mergeable_ranks": {**ranks(), b"a": 98, b"b": 97}}, "does not begin with the 256 bytes"),
        ({"mergeable_ranks": {**ranks(), b"": 261}}, "has tokens that are no bytes"),
        ({"mergeable_ranks": {**ranks(), b"xyz": 261}}, r"token 261 \(b'xyz'\) cannot be joined"),
    ],
)
def test_tokenizers_that_nanochat_does_not_train(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    made = state(**changes)
    if "special_tokens" not in changes:
        made["special_tokens"] = {n: len(made["mergeable_ranks"]) + i for i, n in enumerate(SPECIAL_TOKENS)}
    dump(tmp_path, tiktoken.Encoding(**made))
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)


def test_a_state_without_tokens_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81}b."
    (tmp_path / "tokenizer.pkl").write_bytes(program)
    with pytest.raises(ConfigError, match=r"holds no tokens; copy it again"):
        load_tokenizer(tmp_path)
