"""Orders that look random and are defined here alone: no library's upgrade can change the order of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

SHUFFLE_WINDOW = 1024
"""Documents of one unit that change places among each other: nanochat's row group."""


def digest(*parts: object) -> int:
    """64 bits that depend on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def permutation(length: int, *seed: object) -> NDArray[np.int64]:
    """The numbers 0 to `length` - 1 in an order chosen by `seed`: by splitmix64 (Steele et al. 2014)."""
    x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.array([digest(*seed)], dtype=np.uint64)  # an array, as numpy warns of a scalar's overflow
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def shuffled(items: Iterable[T], *seed: object, window: int = SHUFFLE_WINDOW) -> Iterator[T]:
    """`items` with every `window` of them in an order chosen by `seed`; holds one window in memory."""
    source = iter(items)
    number = 0
    while held := list(islice(source, window)):
        yield from (held[i] for i in permutation(len(held), *seed, number))
        number += 1
