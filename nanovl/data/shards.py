"""Shards of tokens packed ahead by `nanovl data pack`: safetensors files that any library reads.

`tokens` [total] uint16, or uint32 for a vocabulary above 65,536: the documents one after the other, without
the token that begins a document. `offsets` [documents + 1] int64: document i is tokens[offsets[i] : offsets[i
+ 1]]. The header's metadata: format = "nanovl-tokens-1", tokenizer_hash, vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovl.errors import DataError

SUFFIX = ".safetensors"
FORMAT = "nanovl-tokens-1"
BLOCK_DOCUMENTS = 1024
"""Documents that are read at once."""


def write_shard(
    path: Path, documents: Sequence[NDArray[np.int32]], tokenizer_hash: str, vocab_size: int
) -> None:
    """Write `documents` (without their first, special token) to `path`."""
    from safetensors.numpy import save

    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    tokens = np.concatenate(documents).astype(dtype)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    metadata = {"format": FORMAT, "tokenizer_hash": tokenizer_hash, "vocab_size": str(vocab_size)}
    # through bytes, since save_file makes files that only their owner may read
    path.write_bytes(save({"tokens": tokens, "offsets": offsets}, metadata))


def tokenizer_of(path: Path) -> str:
    """Hash of the tokenizer that the shard was packed with. Raises DataError for a file of another format."""
    with _open(path) as shard:
        found: str = shard.metadata()["tokenizer_hash"]
        return found


def num_blocks(path: Path) -> int:
    """Blocks of BLOCK_DOCUMENTS documents, the last one shorter. Raises DataError as tokenizer_of."""
    with _open(path) as shard:
        return -(-(shard.get_slice("offsets").get_shape()[0] - 1) // BLOCK_DOCUMENTS)


def read_block(path: Path, block: int) -> list[NDArray[np.int32]]:
    """The documents of one block."""
    first = block * BLOCK_DOCUMENTS
    with _open(path) as shard:
        starts = shard.get_slice("offsets")
        offsets = starts[first : min(first + BLOCK_DOCUMENTS + 1, starts.get_shape()[0])]
        tokens = shard.get_slice("tokens")[int(offsets[0]) : int(offsets[-1])].astype(np.int32)
    return np.split(tokens, offsets[1:-1] - offsets[0])


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        shard = safe_open(path, framework="np")
        metadata = shard.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not a readable token shard: {error}; write it again with nanovl data pack"
        ) from None
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{path}: no token shard: its format is {metadata.get('format')!r}, not {FORMAT!r}; "
            "name a folder written by nanovl data pack"
        )
    return shard
