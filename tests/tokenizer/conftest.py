"""One small tokenizer for the whole room, and the folder it is saved in."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from nanovl.tokenizer.bpe import Tokenizer
from nanovl.tokenizer.train import train_tokenizer

FOREIGN = "Ça va bien? Привет, мир! 今天天气很好。 שלום עולם 🤖🎉 ½ ٣٤ \r\n\t  12345 don't WE'LL\n\n"


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """About 480,000 characters of English documentation, and a line of other scripts after every topic."""
    return [topics[key] + FOREIGN for key in sorted(topics)]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> Tokenizer:
    return train_tokenizer(
        corpus, 1024, trainer="rustbpe", max_characters=10_000_000, document_characters=100_000
    )


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save(path)
    return path
