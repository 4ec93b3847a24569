"""A model four times as large as memory may be is converted, in every direction; loading it fails under that limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nanovl.checkpoint.hf import config_of, under_their_names
from nanovl.checkpoint.safetensors_files import write_safetensors
from nanovl.checkpoint.tensors import Tensors, weights_of
from nanovl.config.schema import Model
from nanovl.registry import resolve_model
from nanovl.tokenizer.bpe import Tokenizer

HERE = Path(__file__).parent


class Drawn(Tensors):
    """Random weights, made when they are read."""

    def __init__(self, described: dict[str, torch.Tensor]) -> None:
        self.described = described

    def read(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name))
        return torch.randn(self.described[name].shape, generator=generator)


def directory(folder: Path, layers: int, hidden: int, shard_bytes: int) -> int:
    """A Hugging Face directory of Qwen3 in float32; returns its bytes."""
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "blocks": {"full": {"ffn": {"intermediate_size": 2 * hidden}}},
    }
    spec = resolve_model(Model(name="qwen3", flavor="debug", overrides=sizes), 265)
    weights = Drawn({name: w.detach() for name, w in weights_of(spec).items()})
    folder.mkdir()
    write_safetensors(folder, under_their_names(weights, spec), shard_bytes, {})
    (folder / "config.json").write_text(json.dumps(config_of(spec, weights)))
    Tokenizer([]).save(folder)
    return sum(value.nbytes for value in weights.described.values())


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
@pytest.mark.parametrize(
    ("layers", "hidden", "limit"),
    [
        pytest.param(20, 512, 32 * 2**20, id="32MB"),
        pytest.param(56, 1280, 512 * 2**20, id="512MB", marks=pytest.mark.slow),
    ],
)
def test_four_times_the_memory(tmp_path: Path, layers: int, hidden: int, limit: int) -> None:
    size = directory(tmp_path / "theirs", layers, hidden, limit // 2)
    directory(tmp_path / "warm", 1, 64, 2**40)
    assert size >= 4 * limit
    assert len(list((tmp_path / "theirs").glob("model-*"))) >= 8
    places = map(str, (tmp_path / "theirs", tmp_path, tmp_path / "warm"))
    done = subprocess.run(
        [sys.executable, str(HERE / "memory.py"), *places, str(limit)],
        # one arena, and large blocks given back at once
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "allocate memory" in found["load"]
    assert max(found["peaks"].values()) <= limit, found
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as whole:
        for file in (tmp_path / "theirs").glob("model-*"):
            with safe_open(file, framework="pt") as part:
                for name in part.keys():  # noqa: SIM118  (it is no dict)
                    assert torch.equal(part.get_tensor(name), whole.get_tensor(name)), name
