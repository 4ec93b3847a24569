"""A source as the config names it -> its files, their units of random access, the split for validation."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any, Literal

from nanovl.config.schema import Job, Source
from nanovl.data.readers import KINDS, STDLIB_TOPICS, DataFile, Document
from nanovl.data.shards import tokenizer_of
from nanovl.errors import ConfigError, DataError

Split = Literal["train", "heldout", "all"]
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class OpenSource:
    """The files of one split of a source, as they were when it was opened."""

    key: str
    """Its place in the config, such as `data.sources.0`."""
    settings: Source
    files: list[DataFile]
    first_units: list[int]
    """Number of units before each file, and in the end of all."""

    @property
    def num_units(self) -> int:
        return self.first_units[-1]

    def locate(self, unit: int) -> tuple[DataFile, int]:
        """The file that `unit` is a part of, and which part."""
        file = bisect_right(self.first_units, unit) - 1
        return self.files[file], unit - self.first_units[file]

    def documents(self, unit: int) -> Iterator[Document]:
        """The unit's documents in the order of the file; empty ones are passed over. Raises DataError."""
        file, part = self.locate(unit)
        try:
            if (size := file.path.stat().st_size) != file.size:
                raise DataError(
                    f"{file.path}: {size:,} bytes, but {file.size:,} when the run started; "
                    "put the file back as it was, or start a fresh run"
                )
            kind = KINDS[self.settings.kind]
            yield from (found for found in kind.documents(file, part, self.settings.column) if len(found))
        except OSError as error:
            raise DataError(
                f"{file.path}: {error.strerror or error}; it could be read when the run started: "
                "put it back as it was, then --resume"
            ) from None

    def record(self) -> dict[str, Any]:
        """What decides which documents there are, without a path of this machine."""
        return {
            "kind": self.settings.kind,
            "column": self.settings.column,
            "weight": self.settings.weight,
            "holdout": self.settings.holdout,
            "files": len(self.files),
            "fingerprint": hashlib.sha256(json.dumps(self.file_sizes()).encode()).hexdigest(),
        }

    def file_sizes(self) -> dict[str, int]:
        """Bytes of every file, by its name below the source's folder."""
        return {file.name: file.size for file in self.files}


def open_source(settings: Source, key: str, split: Split, tokenizer_hash: str = "") -> OpenSource:
    """List and check a source; `tokenizer_hash` is what shards of kind "tokens" must have been packed with.

    Raises ConfigError for settings that cannot be meant, DataError for what is wrong with the files.
    """
    files = _in_split(_list_files(settings, key), settings, key, split)
    if settings.kind == "tokens":
        for file in files:
            if (packed := tokenizer_of(file.path)) != tokenizer_hash:
                raise DataError(
                    f"{file.path}: packed with tokenizer {packed[:12]}, the job's is {tokenizer_hash[:12]}; "
                    "set tokenizer.path to the tokenizer in the shards' folder, or run nanovl data pack again"
                )
    with ThreadPoolExecutor(8) as pool:  # each file of some kinds is opened, which takes long over a network
        parts = list(pool.map(KINDS[settings.kind].parts, files, repeat(settings.column)))
    return OpenSource(key, settings, files, [0, *accumulate(parts)])


def training_sources(job: Job, tokenizer_hash: str = "") -> list[OpenSource]:
    """The training split of every source of the job."""
    return [
        open_source(settings, f"data.sources.{i}", "train", tokenizer_hash)
        for i, settings in enumerate(job.data.sources)
    ]


def heldout_place(name: str) -> float:
    """Where the file called `name` stands from 0 to 1; it is held out where `holdout` is above that."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def changed_files(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    """The first difference between two `file_sizes`, in words; empty if there is none."""
    for name in sorted({*before, *now}):
        if name not in now:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        if before[name] != now[name]:
            return f"{name} had {before[name]:,} bytes and now has {now[name]:,}"
    return ""


def _list_files(settings: Source, key: str) -> list[DataFile]:
    if settings.kind == "stdlib":
        if settings.path:
            raise ConfigError(
                f'{key}.path = {settings.path!r}: kind "stdlib" reads the running Python\'s own library; '
                'leave path out, or set kind = "text"'
            )
        return _stdlib_files()
    root = Path(settings.path).expanduser()
    suffixes = KINDS[settings.kind].suffixes
    if root.is_file():
        return [_data_file(root, root.name, key)]
    if not root.is_dir():
        raise DataError(f"{key}.path = {settings.path!r}: no such file or folder (looked in {Path.cwd()})")
    files = [_data_file(path, name, key) for path, name in _walk(root, set()) if name.endswith(suffixes)]
    if not files:
        wanted = " or ".join(f"*{s}" for s in suffixes if s) or "file"
        raise DataError(f"{key}.path = {settings.path!r}: no {wanted} below this folder; set path or kind")
    return files


def _stdlib_files() -> list[DataFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [(path, name) for path, name in _walk(root, _NOT_STDLIB) if name.endswith(".py")]
    files = [_data_file(path, name, "stdlib") for path, name in sources]
    if STDLIB_TOPICS not in {file.name for file in files}:
        raise DataError(f"{root}: this Python comes without its library's sources; name text of your own")
    return [file for file in files if file.size]  # many packages have an empty __init__.py


def _walk(root: Path, without: set[str]) -> list[tuple[Path, str]]:
    """Every file below `root` but hidden ones, with its name from there, in the order of the names."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [(path, path.relative_to(root).as_posix()) for path in paths]
    return sorted(found, key=lambda pair: pair[1])


def _data_file(path: Path, name: str, key: str) -> DataFile:
    try:
        return DataFile(path, name, path.stat().st_size)
    except OSError as error:
        raise DataError(f"{key}: {path}: {error.strerror}; mend or remove it") from None


def _in_split(files: Sequence[DataFile], settings: Source, key: str, split: Split) -> list[DataFile]:
    if split == "all":
        return list(files)
    chosen = [f for f in files if (heldout_place(f.name) < settings.holdout) == (split == "heldout")]
    if not chosen:
        what, pick, step = ("validation", min, 1) if split == "heldout" else ("training", max, 0)
        file = pick(files, key=lambda file: heldout_place(file.name))
        nearest = (int(heldout_place(file.name) * 10_000) + step) / 10_000
        raise DataError(
            f"{key}.holdout = {settings.holdout}: none of its {len(files)} files is left for {what}; "
            f"set it to {nearest:.4f}, which leaves {file.name}, or name other text in [[validation.sources]]"
        )
    return chosen
