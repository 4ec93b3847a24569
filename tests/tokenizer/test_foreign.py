"""Tokenizers of other projects' kinds, built with the library that made theirs, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from nanovl.errors import ConfigError
from nanovl.tokenizer.bpe import load_tokenizer
from nanovl.tokenizer.foreign import ForeignTokenizer

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "<|im_end|> Hello  world's 123 <think>é e\u0301</think>\r\n\n 漢字 🤖<|endoftext|>"
Build = Callable[[list[str]], tokenizers.Tokenizer]


def byte_level(corpus: list[str], pattern: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus[:20], trainer)
    return made


def qwen(corpus: list[str]) -> tokenizers.Tokenizer:
    """Normalizes Unicode; `<think>` is an added token but not a special one; there is no bos."""
    made = byte_level(corpus, QWEN_PATTERN)
    made.normalizer = normalizers.NFC()
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return made


def llama3(corpus: list[str]) -> tokenizers.Tokenizer:
    """Puts bos before every text by itself, and would cut and pad."""
    made = byte_level(corpus, r"\p{N}{1,3}|\s+|[^\s\p{N}]+")
    made.add_special_tokens(["<|begin_of_text|>", "<|endoftext|>"])
    bos = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    made.enable_truncation(max_length=3)
    made.enable_padding(length=100, pad_id=made.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>")
    return made


def llama2(corpus: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece's kind: a mark for the space, one before the text, bytes only for unknown characters."""
    trained = tokenizers.Tokenizer(models.BPE())
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = marks
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, max_token_length=8, special_tokens=first
    )
    trained.train_from_iterator((text[:300] for text in corpus[:20]), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    made.normalizer = marks
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(first[:3])
    return made


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
CASES = [
    (qwen, None),
    (llama3, "<|begin_of_text|>"),
    (llama2, {"__type": "AddedToken", "content": "<s>", **FLAGS}),
]
every_kind = pytest.mark.parametrize(("build", "bos"), CASES, ids=["qwen", "llama3", "llama2"])


def saved(build: Build, bos: Any, corpus: list[str], folder: Path) -> ForeignTokenizer:
    build(corpus).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(folder)
    assert isinstance(found, ForeignTokenizer)
    return found


@every_kind
def test_ids_and_text_equal_transformers(build: Build, bos: Any, corpus: list[str], tmp_path: Path) -> None:
    found = saved(build, bos, corpus, tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert found.bos_id == auto.bos_token_id
    assert found.vocab_size == len(auto)
    for text in (TEXT, corpus[25][:5000], "", "<s> </s>"):
        ids = found.encode(text)
        assert ids == auto.encode(text, add_special_tokens=False, split_special_tokens=True, truncation=False)
        parsed = found.encode(text, parse_special=True)
        assert parsed == auto.encode(text, add_special_tokens=False, truncation=False)
        assert not set(ids) & set(found.special_ids.values())
        assert found.decode(ids) == auto.decode(ids)
        assert found.decode(parsed) == auto.decode(parsed)


@every_kind
def test_bytes_are_those_of_the_text(build: Build, bos: Any, corpus: list[str], tmp_path: Path) -> None:
    found = saved(build, bos, corpus, tmp_path)
    ids = found.encode(TEXT, parse_special=True)
    assert found.decode_bytes(ids).decode().strip() == found.decode(ids).strip()
    token_bytes = found.token_bytes()
    assert token_bytes.shape == (found.vocab_size,)
    specials = set(found.special_ids.values())
    kept = [i for i in range(found.vocab_size) if i not in specials]
    assert [int(n) for n in token_bytes[kept]] == [len(found.decode_bytes([i])) for i in kept]
    assert not token_bytes[list(specials)].any()


@every_kind
def test_batches_equal_single_texts(build: Build, bos: Any, corpus: list[str], tmp_path: Path) -> None:
    found = saved(build, bos, corpus, tmp_path)
    texts = [*corpus[:10], "a\ud800b", TEXT]
    alone = [found.encode(text, bos=bos is not None) for text in texts]
    assert found.encode_batch(texts, bos=bos is not None) == alone
    assert found.encode_batch(texts, bos=bos is not None, threads=2) == alone


@every_kind
def test_saving_keeps_the_files(build: Build, bos: Any, corpus: list[str], tmp_path: Path) -> None:
    found = saved(build, bos, corpus, tmp_path)
    found.save(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert load_tokenizer(tmp_path / "copy").hash() == found.hash()


def test_bos_is_put_first_by_id_only(corpus: list[str], tmp_path: Path) -> None:
    found = saved(llama3, "<|begin_of_text|>", corpus, tmp_path)
    assert found.bos_id == found.special_ids["<|begin_of_text|>"]
    assert found.encode("hi", bos=True) == [found.bos_id, *found.encode("hi")]
    assert found.decode(found.encode("hi", bos=True)) == "<|begin_of_text|>hi"


def test_without_a_config_there_is_no_bos(corpus: list[str], tmp_path: Path) -> None:
    qwen(corpus).save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert found.bos_id is None
    with pytest.raises(
        ConfigError, match=r"no token that begins a document; .*: <\|endoftext\|>, <\|im_end\|>"
    ):
        found.encode("hi", bos=True)
    found.save(tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]


def test_hash_follows_the_file_and_the_bos(corpus: list[str], tmp_path: Path) -> None:
    first = saved(qwen, None, corpus, tmp_path).hash()
    assert saved(qwen, "<|endoftext|>", corpus, tmp_path).hash() != first
    assert saved(llama3, None, corpus, tmp_path).hash() != first


def test_an_unknown_id_is_an_error(corpus: list[str], tmp_path: Path) -> None:
    found = saved(qwen, None, corpus, tmp_path)
    for wrong in (found.vocab_size, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} stands for nothing"):
            found.decode([1, wrong])
        with pytest.raises(ValueError, match=f"token id {wrong} stands for nothing"):
            found.decode_bytes([wrong])


def test_a_bos_that_is_not_in_the_vocabulary_is_an_error(corpus: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tokenizer_config.json: bos_token '<s>' is not in tokenizer.json; correct"
    ):
        saved(qwen, "<s>", corpus, tmp_path)


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (
            decoders.Sequence([decoders.ByteFallback(), decoders.Replace(Regex("x"), "y")]),
            "ByteFallback, Replace by Regex",
        ),
    ],
)
def test_a_decoder_without_bytes_is_an_error(
    corpus: list[str], tmp_path: Path, decoder: Any, named: str
) -> None:
    made = qwen(corpus)
    made.decoder = decoder
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ConfigError, match=rf"its decoder \({named}\) does not tell the bytes .*ByteLevel or ByteFallback"
    ):
        load_tokenizer(tmp_path)
