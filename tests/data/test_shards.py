from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanovl.config.schema import Source
from nanovl.data import shards
from nanovl.data.sources import open_source
from nanovl.errors import DataError


def test_documents_come_back_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_DOCUMENTS", 3)
    documents = [np.arange(n, dtype=np.int32) + 7 for n in (2, 0, 3, 1, 1, 4, 2)]
    path = tmp_path / "a.safetensors"
    shards.write_shard(path, documents, "hash", vocab_size=300)
    assert shards.num_blocks(path) == 3
    blocks = [[d.tolist() for d in shards.read_block(path, i)] for i in range(3)]
    assert blocks == [[[7, 8], [], [7, 8, 9]], [[7], [7], [7, 8, 9, 10]], [[7, 8]]]
    assert shards.read_block(path, 0)[0].dtype == np.int32


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_file_is_what_the_format_says(tmp_path, vocab_size, dtype):
    path = tmp_path / "a.safetensors"
    shards.write_shard(path, [np.array([vocab_size - 1, 1]), np.array([5])], "hash", vocab_size)
    tensors = load_file(path)
    assert tensors["tokens"].tolist() == [vocab_size - 1, 1, 5]
    assert tensors["tokens"].dtype == dtype
    assert tensors["offsets"].tolist() == [0, 2, 3]


def test_as_a_source_without_empty_documents(tmp_path):
    shards.write_shard(
        tmp_path / "a.safetensors", [np.array([1, 2]), np.array([], int), np.array([3])], "h", 9
    )
    source = open_source(Source(kind="tokens", path=str(tmp_path)), "data.sources.0", "train", "h")
    assert [d.tolist() for d in source.documents(0)] == [[1, 2], [3]]


def test_refuses_the_shards_of_another_tokenizer_and_other_files(tmp_path):
    path = tmp_path / "a.safetensors"
    shards.write_shard(path, [np.array([1])], "f00ba4" * 8, 9)
    source = Source(kind="tokens", path=str(tmp_path))
    with pytest.raises(
        DataError, match=r"packed with tokenizer f00ba4f00ba4, the job's is 0123; set tokenizer.path"
    ):
        open_source(source, "data.sources.0", "train", "0123")
    save_file({"w": np.zeros(2)}, path)
    with pytest.raises(
        DataError, match=r"no token shard: its format is None, not 'nanovl-tokens-1'; name a folder"
    ):
        open_source(source, "data.sources.0", "train", "0123")
    path.write_bytes(b"x" * 20)
    with pytest.raises(
        DataError, match=r"not a readable token shard: .*; write it again with nanovl data pack"
    ):
        open_source(source, "data.sources.0", "train", "0123")
