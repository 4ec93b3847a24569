"""Our tokenizer against itself, the `tokenizers` library and transformers, all from the same saved file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanovl.errors import ConfigError
from nanovl.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer, load_tokenizer

SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x1c"]
WORDS = ["'s", "'LL", "'ſ", "don't", "The", " the", "12345", "٣٤", "½", "é", "e\u0301", "漢字"]
MARKS = ["!?", "...", "🤖", "\u200d", "\x00", "\ufffd"]
fragments = st.sampled_from([*SPACES, *WORDS, *MARKS, *SPECIAL_TOKENS])
texts = st.lists(fragments | st.text(max_size=4), max_size=12).map("".join)
same_fixtures = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@pytest.fixture(scope="module")
def library(folder: Path) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.encode_special_tokens = True
    return found


@given(text=texts)
@example(text="")
@example(text=" " * 1000 + "x" + "\n" * 1000)
@example(text="a" * 5000 + "'s")
@same_fixtures
def test_ids_equal_the_tokenizers_library_and_decode_to_the_text(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert [tokenizer.bos_id, *ids] == library.encode(text).ids
    assert tokenizer.decode(ids) == text == library.decode(ids)
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_real_text_encodes_as_in_the_library(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, corpus: list[str]
) -> None:
    assert [tokenizer.encode(text, bos=True) for text in corpus] == [
        library.encode(text).ids for text in corpus
    ]


def test_every_character_is_classed_as_in_the_library(tmp_path: Path) -> None:
    """`a`, `1` and `!` are joined to the next character's first byte if the pattern leaves them together."""
    probe = Tokenizer([(before, bytes([byte])) for before in (b"a", b"1", b"!") for byte in range(256)])
    probe.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # planes 4 to 13 are empty, 15 and 16 private
    codes = [c for c in [*range(0x40000), *range(0xE0000, 0xE1000)] if not 0xD800 <= c < 0xE000]
    joined = 0
    for start in range(0, len(codes), 4096):
        text = "".join(f"a{chr(c)}1{chr(c)}!{chr(c)}" for c in codes[start : start + 4096])
        ids = probe.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        joined += sum(i >= 256 for i in ids)
    assert len(codes) < joined < 3 * len(codes)


@given(text=texts)
@same_fixtures
def test_ids_equal_transformers(tokenizer: Tokenizer, auto: AutoTokenizer, text: str) -> None:
    assert auto.encode(text, split_special_tokens=True) == tokenizer.encode(text, bos=True)


@pytest.fixture(scope="module")
def auto(folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(folder)


def test_transformers_knows_the_vocabulary_and_the_special_tokens(
    tokenizer: Tokenizer, auto: AutoTokenizer
) -> None:
    assert len(auto) == tokenizer.vocab_size == 1024
    assert (auto.bos_token, auto.bos_token_id) == ("<|bos|>", tokenizer.bos_id)
    assert (auto.eos_token, auto.pad_token) == ("<|assistant_end|>", None)
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.special_ids["<|user_end|>"]]
    assert auto.decode(ids) == tokenizer.decode(ids) == "<|bos|>hi<|user_end|>"
    assert auto.decode(ids, skip_special_tokens=True) == "hi"
    assert (
        auto.encode("<|bos|>hi<|user_end|>", add_special_tokens=False) == ids
    )  # transformers reads them, for chat templates; we never do


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "nanochat"])
def test_transformers_keeps_the_file_beside_a_model_of_any_type(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, model_type: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "Hello  world 12345\n\n\t'S 漢字 🤖"
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode(text) == tokenizer.encode(text, bos=True)
    assert found.encode(text, text) == 2 * tokenizer.encode(text, bos=True)


def test_what_transformers_saves_again_is_still_ours(
    tokenizer: Tokenizer, auto: AutoTokenizer, tmp_path: Path
) -> None:
    auto.save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).hash() == tokenizer.hash()


def test_specials_are_the_last_nine_ids_in_order(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == {name: 1015 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert (SPECIAL_TOKENS[0], SPECIAL_TOKENS[-1], len(SPECIAL_TOKENS)) == ("<|bos|>", "<|output_end|>", 9)
    assert tokenizer.encode("hi", bos=True) == [tokenizer.bos_id, *tokenizer.encode("hi")]


def test_ids_by_hand() -> None:
    """Bytes are their own ids, then merges: 256 = "ab", 257 = "abc"; numbers are cut after two digits."""
    tokenizer = Tokenizer([(b"a", b"b"), (b"ab", b"c"), (b"1", b"2"), (b"12", b"3")])
    assert tokenizer.vocab_size == 269
    assert tokenizer.encode("abc") == [257]
    assert tokenizer.encode("ab é") == [256, 0x20, 0xC3, 0xA9]
    assert tokenizer.encode("123") == [258, ord("3")]
    assert tokenizer.decode_bytes([257, 0xC3]) == b"abc\xc3"
    assert tokenizer.decode([257, 0xC3]) == "abc\ufffd"
    assert tokenizer.decode([260, 257]) == "<|bos|>abc"


def test_a_special_token_written_in_text_is_text(tokenizer: Tokenizer) -> None:
    for name, number in tokenizer.special_ids.items():
        ids = tokenizer.encode(f"x{name}y")
        assert number not in ids
        assert tokenizer.decode(ids) == f"x{name}y"


def test_token_bytes(tokenizer: Tokenizer) -> None:
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.dtype == np.int32
    assert token_bytes.shape == (1024,)
    assert (token_bytes[:256] == 1).all()  # bytes from 0x80 on as well
    assert (token_bytes[-9:] == 0).all()
    assert token_bytes[:-9].tolist() == [len(tokenizer.decode_bytes([i])) for i in range(1015)]


def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83e\udd16") == tokenizer.encode("🤖")


def test_threads_give_the_same_ids(tokenizer: Tokenizer, corpus: list[str]) -> None:
    alone = [tokenizer.encode(text, bos=True) for text in corpus]
    assert tokenizer.encode_batch(corpus, bos=True) == alone
    assert tokenizer.encode_batch(corpus, bos=True, threads=3) == alone
    assert tokenizer.encode_batch([], threads=2) == []


def test_save_and_load(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(folder)
    assert loaded.merges == tokenizer.merges
    assert loaded.hash() == tokenizer.hash()
    loaded.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert isinstance(load_tokenizer(folder), Tokenizer)


def test_hash_follows_the_merges() -> None:
    one, other = Tokenizer([(b"a", b"b"), (b"c", b"d")]), Tokenizer([(b"c", b"d"), (b"a", b"b")])
    assert one.hash() == Tokenizer([(b"a", b"b"), (b"c", b"d")]).hash() != other.hash()
    assert len(one.hash()) == 64


@pytest.mark.parametrize("wrong", [1024, -1, 2**40])
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {wrong} stands for nothing"):
        tokenizer.decode([1, wrong])


@pytest.mark.parametrize("merges", [[(b"ab", b"c")], [(b"a", b"b"), (b"a", b"b")]])
def test_merges_must_make_new_tokens_of_known_ones(merges: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(
        ValueError, match=rf"merge {len(merges) - 1}, .* does not make a new token of two known ones"
    ):
        Tokenizer(merges)


def test_a_changed_file_is_not_ours(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"tokenizer.json: not written by nanovl; read it with load_tokenizer"
    ):
        Tokenizer.load(tmp_path)
    assert load_tokenizer(tmp_path).encode("a  b") != Tokenizer.load(folder).encode("a  b")
