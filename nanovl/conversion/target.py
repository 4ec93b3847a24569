"""What formats to write have in common. A new one is a class here in the room and an entry of `TARGETS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanovl.checkpoint.sources import Source
from nanovl.checkpoint.tensors import Tensors
from nanovl.spec import ModelSpec
from nanovl.tokenizer.bpe import AnyTokenizer

MTP = "multi-token prediction"


@dataclass(frozen=True)
class Model:
    """What is to be written."""

    source: Source
    spec: ModelSpec
    weights: Tensors
    """Under our names, in the dtype to write."""
    tokenizer: AnyTokenizer
    shard_bytes: int
    """Of targets that have shards: the most that one file holds."""
    left_away: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What is not written, as asked -> its tensors in the source."""


class Target(ABC):
    """A format to write."""

    has_shards = False

    @abstractmethod
    def tensors(self, model: Model) -> Tensors:
        """What the files will hold. Raises CheckpointError or ConfigError where the format cannot say the same."""

    @abstractmethod
    def write(self, model: Model, tensors: Tensors, folder: Path, final: Path) -> None:
        """Write `folder`, an empty one, which will be renamed to `final`."""
