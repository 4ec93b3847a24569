"""Weights in DCP, torch's distributed checkpoints, read and written one tensor at a time by a single process."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from nanovl.checkpoint.tensors import Tensors
from nanovl.errors import CheckpointError

MODEL = "model."
"""What names of weights begin with in a checkpoint; the others are the optimizer's."""


class Reader(FileSystemReader):
    """Reads the metadata once, however often it is asked to load."""

    metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.metadata is None:
            self.metadata = super().read_metadata(*args, **kwargs)
        return self.metadata


class StateFolder(Tensors):
    """The weights in a checkpoint's `state` folder, however many ranks wrote it."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where it cannot be read or was cut short."""
        self.folder, self.reader = folder, Reader(folder)
        stored = read_metadata(self.reader, folder).state_dict_metadata
        self.described = {
            key.removeprefix(MODEL): torch.empty(said.size, dtype=said.properties.dtype, device="meta")
            for key, said in stored.items()
            if key.startswith(MODEL) and isinstance(said, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        value = torch.empty_like(self.described[name], device="cpu")
        read_state(self.folder, {MODEL + name: value}, self.reader, no_dist=True)
        return value


def read_metadata(reader: FileSystemReader, folder: Path) -> Metadata:
    """Names, shapes and places of what `folder` holds. Raises CheckpointError where files are absent or cut short."""
    try:
        metadata = reader.read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}; choose an earlier step") from error
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():  # DCP itself reads what is left
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size < end:
            raise CheckpointError(f"{folder / name} has {size} bytes of {end}; choose an earlier step")
    return metadata


def read_state(folder: Path, state: dict[str, Any], reader: FileSystemReader, *, no_dist: bool) -> None:
    """dcp.load into `state`. Raises CheckpointError where data is damaged."""
    try:
        with warnings.catch_warnings():
            # one process loads as one: meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load_state(state, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:  # a BaseException: it carries what went wrong on every rank
        reasons = "; ".join(sorted({repr(failure[0]) for failure in error.failures.values()}))
        raise CheckpointError(f"{folder}: damaged: {reasons}; choose an earlier step") from error


def write_state(folder: Path, tensors: Tensors) -> None:
    """Write weights as DCP that any mesh loads, a file for each: DCP holds the tensors of one file until it ends."""
    writer = FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
    state = {MODEL.rstrip("."): dict(tensors.described)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            save_state(state, storage_writer=writer, planner=_Streaming(tensors), no_dist=True)
        except CheckpointException as error:  # wraps what reading or writing raised
            raise error.failures[0][0] from None


class _Streaming(DefaultSavePlanner):
    """Plans with descriptions; a tensor is read when it is its turn to be written."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.tensors.read(index.fqn.removeprefix(MODEL))
