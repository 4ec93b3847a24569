"""One thread a process: two busy OpenMP threads on two cores spin against each other."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small real text files: modules of Python's own library."""
    folder = tmp_path_factory.mktemp("corpus")
    modules = sorted(
        Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda p: (p.stat().st_size, p.name)
    )
    for module in [m for m in modules if 2_000 < m.stat().st_size < 20_000][:40]:
        (folder / f"{module.stem}.txt").write_bytes(module.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 512 entries trained on the corpus."""
    from nanovl.tokenizer.train import train_tokenizer

    texts = [p.read_text(errors="replace") for p in sorted(corpus.iterdir())]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 512, trainer="rustbpe", max_characters=10**7, document_characters=10**5).save(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tiny_flags(corpus: Path, tokenizer_folder: Path) -> list[str]:
    """Flags over configs/debug.toml that make a run of a second: small data, 2 layers, no evaluation."""
    return [
        "--data.sources.0.kind=text",
        f"--data.sources.0.path={corpus}",
        "--data.sources.0.holdout=0.1",
        f"--tokenizer.path={tokenizer_folder}",
        "--model.num_hidden_layers=2",
        "--training.seq_len=64",
        "--validation.freq=0",
        "--sampling.prompts=[]",
        "--checkpoint.interval=0",
    ]
