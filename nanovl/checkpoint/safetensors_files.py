"""safetensors: looked through without reading tensors, read one tensor at a time, written in one pass.

The library maps whole files to read them, and writes tensors that are all in memory; here memory holds the tensor that
is being read or written. The format is eight bytes of length, a JSON header of that length with dtype, shape and place
of each tensor, and the tensors end to end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovl.checkpoint.tensors import Tensors
from nanovl.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    nbytes: int


class SafetensorsFolder(Tensors):
    """model.safetensors of a folder, the shards that its index names, or `files`, in the order of the files."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """Raises CheckpointError listing every file and tensor that is damaged, absent or there twice."""
        self.described: dict[str, Tensor] = {}
        self._places: dict[str, _Place] = {}
        files, index = _files(folder) if files is None else (files, {})
        wrong = []
        for file in files:
            try:
                for name, value, place in _look_through(file):
                    if name in self._places:
                        wrong.append(f"{name} is in {self._places[name].file.name} and in {file.name}")
                    self.described[name], self._places[name] = value, place
            except CheckpointError as error:
                wrong.append(str(error))
        if not wrong:
            wrong = [
                f"{INDEX} names {n} in {f}, which lacks it" for n, f in index.items() if self._lacks(n, f)
            ]
        if wrong:
            raise CheckpointError(f"{folder}: copy it again:" + "".join(f"\n  {line}" for line in wrong))

    def read(self, name: str) -> Tensor:
        place, value = self._places[name], self.described[name]
        data = torch.empty(place.nbytes, dtype=torch.uint8)
        with place.file.open("rb", buffering=0) as handle:
            handle.seek(place.offset)
            _read_into(handle, data, place.file)
        return data.view(value.dtype).view(value.shape)

    def _lacks(self, name: str, file: str) -> bool:
        return name not in self._places or self._places[name].file.name != file


def write_safetensors(folder: Path, tensors: Tensors, shard_bytes: int, metadata: Mapping[str, str]) -> None:
    """Write all of `tensors` into `folder`: as model.safetensors, or as shards of at most `shard_bytes` and an index.

    A tensor larger than that has a shard of its own.
    """
    shards = _shards(tensors.described, shard_bytes)
    places: dict[str, _Place] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        places |= _begin(file, shard, metadata)
        with file.open("r+b", buffering=0) as handle:
            for name, described in shard.items():
                value = tensors.read(name)
                assert (value.shape, value.dtype) == (described.shape, described.dtype), name
                handle.seek(places[name].offset)
                _write_all(handle, value)
    if len(shards) > 1:
        said = {
            "metadata": {"total_size": sum(place.nbytes for place in places.values())},
            "weight_map": {name: place.file.name for name, place in sorted(places.items())},
        }
        (folder / INDEX).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> tuple[Sequence[Path], dict[str, str]]:
    """The files with tensors, and the index's tensor -> file; none where there is a single file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        return [folder / SINGLE], {}
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: names no files: {error!r}; copy it again") from None
    names = sorted(set(weight_map.values()))
    if (folder / SINGLE).is_file() and SINGLE not in names:
        raise CheckpointError(
            f"{folder}: has two sets of weights, {SINGLE} and the files that {INDEX} names; take one of them away"
        )
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {INDEX} names files that are not there: {', '.join(absent)}")
    return [folder / name for name in names], weight_map


def _look_through(file: Path) -> list[tuple[str, Tensor, _Place]]:
    """Every tensor of `file`: name, shape and dtype, place. Raises CheckpointError where it is damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            begin = 8 + int.from_bytes(handle.read(8), "little")
            if begin > size:
                raise CheckpointError(
                    f"{file.name} is damaged: it has {size} bytes, its header alone {begin}"
                )
            header: dict[str, Any] = json.loads(handle.read(begin - 8))
        header.pop("__metadata__", None)
        entries = sorted(
            (*said["data_offsets"], name, torch.Size(said["shape"]), str(said["dtype"]))
            for name, said in header.items()
        )
        if negative := [name for _, _, name, shape, _ in entries if min(shape, default=0) < 0]:
            raise CheckpointError(f"{file.name} is damaged: {negative[0]} has a negative size")
    except CheckpointError:  # which is a ValueError
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.name} is damaged: no header of safetensors: {error!r}") from None
    if strange := {entry[-1] for entry in entries} - DTYPES.keys():
        raise CheckpointError(
            f"{file.name} has tensors of dtype {', '.join(sorted(strange))}, which no model here has"
        )
    found, reached = [], 0
    for start, end, name, shape, dtype in entries:
        value = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        if start != reached or end - start != value.nbytes:
            raise CheckpointError(f"{file.name} is damaged: {name} has not the place that its shape needs")
        found.append((name, value, _Place(file, begin + start, end - start)))
        reached = end
    if begin + reached != size:
        raise CheckpointError(f"{file.name} is damaged: it has {size} bytes of {begin + reached}")
    return found


def _read_into(handle: Any, data: Tensor, file: Path) -> None:
    view, done = data.numpy().data, 0
    while done < len(view):
        read = handle.readinto(view[done:])
        if not read:
            raise CheckpointError(f"{file}: became shorter while it was read; copy it again")
        done += read


def _write_all(handle: Any, value: Tensor) -> None:
    view, done = value.contiguous().flatten().view(torch.uint8).numpy().data, 0
    while done < len(view):
        done += handle.write(view[done:])


def _shards(described: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in described.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards


def _begin(file: Path, shard: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, _Place]:
    """Write the header and make room for the tensors: those of wide numbers first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, value in sorted(shard.items(), key=lambda item: -item[1].element_size()):
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)
    return {
        name: _Place(file, 8 + len(text) + header[name]["data_offsets"][0], value.nbytes)
        for name, value in shard.items()
    }
