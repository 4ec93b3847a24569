"""`nanovl.convert`: a model in one format -> the same model in another, tensor by tensor."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovl.checkpoint.hf import kinds, main_dtype
from nanovl.checkpoint.locate import find_source
from nanovl.checkpoint.tensors import InDtype, Renamed, Tensors
from nanovl.conversion.hf_directory import HuggingFaceTarget
from nanovl.conversion.nanochat_files import NanochatTarget
from nanovl.conversion.ours import DcpTarget, PlainTarget, RunTarget
from nanovl.conversion.target import Model, Target
from nanovl.errors import CheckpointError, ConfigError, RunError
from nanovl.tokenizer.bpe import load_tokenizer

TARGETS: dict[str, type[Target]] = {
    "hf": HuggingFaceTarget,
    "run": RunTarget,
    "dcp": DcpTarget,
    "safetensors": PlainTarget,
    "nanochat": NanochatTarget,
}
DTYPES = ("float32", "bfloat16", "float16")
SHARD_SIZE = "5GB"
"""That of transformers."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    dtype: str | torch.dtype | None = None,
    shard_size: str | None = None,
) -> Path:
    """Write the model at `src` to the new folder `dst` as `to`: hf, run, dcp (a checkpoint), safetensors or nanochat.

    `dtype` is that of written parameters; None = as they are stored. `shard_size`, for hf, is the most that one file
    holds (5GB). Returns `dst`. Raises CheckpointError with every weight that does not fit, ConfigError, RunError; then
    nothing is written.
    """
    require_new(Path(dst))
    plan(src, to=to, dtype=dtype, shard_size=shard_size).write(Path(dst))
    return Path(dst)


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked, before any tensor is read."""

    model: Model
    target: Target
    tensors: Tensors
    """What the target writes, under its names."""
    dtype: torch.dtype | None
    """As asked; None = as stored."""

    def write(self, dst: Path) -> None:
        """Write the new folder `dst`. Raises RunError where it is in use, CheckpointError where writing fails."""
        try:
            with new_folder(dst) as draft:
                self.target.write(self.model, self.tensors, draft, dst)
        except OSError as error:
            raise CheckpointError(f"{dst}: cannot be written: {error}; nothing is left of it") from error

    def mapping(self) -> list[str]:
        """A line for each group of tensors, as read and as written: names, shapes, dtypes."""
        return list(_mappings(self.tensors))

    def summary(self) -> str:
        """One line: what is written, how much, in which dtype."""
        values = self.tensors.described.values()
        main = main_dtype(self.model.weights)
        others = sum(value.dtype != main for value in values)
        chosen = "as stored" if self.dtype is None else "as asked"
        named = f"{str(main).removeprefix('torch.')}, {chosen}"
        more = f"; {others} tensors in other dtypes" if others else ""
        size = sum(value.nbytes for value in values) / 1e6
        return f"{self.model.spec.family.name}: {len(values)} tensors, {size:,.1f} MB, {named}{more}"


def plan(
    src: str | Path, *, to: str, dtype: str | torch.dtype | None = None, shard_size: str | None = None
) -> Plan:
    """Check a conversion as `convert` does, and write nothing."""
    named = str(dtype).removeprefix("torch.")
    wrong = []
    if to not in TARGETS:
        wrong.append(f"to = {to!r}: wants one of {', '.join(TARGETS)}")
    if dtype is not None and named not in DTYPES:
        wrong.append(f"dtype = {named!r}: wants one of {', '.join(DTYPES)}")
    if shard_size is not None and to in TARGETS and not TARGETS[to].has_shards:
        wrong.append(f"shard_size = {shard_size!r}: only hf has shards; leave it out")
    if (shard_bytes := _bytes(shard_size or SHARD_SIZE)) is None:
        wrong.append(f"shard_size = {shard_size!r}: wants a size above 0 such as 500MB or 5GB")
    if wrong:
        raise ConfigError(wrong)
    assert shard_bytes is not None
    source = find_source(Path(src))
    wanted = None if dtype is None else getattr(torch, named)
    weights = InDtype(source.weights(source.spec), kinds(source.spec, wanted))
    model = Model(source, source.spec, weights, load_tokenizer(source.tokenizer), shard_bytes)
    target = TARGETS[to]()
    return Plan(model, target, target.tensors(model), wanted)


def require_new(dst: Path) -> None:
    """Raises RunError where something is in the way of a new folder."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise RunError(f"{dst} is in use; name a new folder")


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A draft to write into, which becomes `dst` in one rename once all is on disk, or vanishes.

    What a killed conversion left under the draft's name is removed by the next one.
    """
    require_new(dst)
    draft = dst.absolute().with_name(f".{dst.absolute().name}.unfinished")
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in (*draft.rglob("*"), draft):
            _flush(path)
        draft.rename(dst)
        _flush(draft.parent)
    except BaseException:
        shutil.rmtree(draft)
        raise


def _flush(path: Path) -> None:
    """To disk, a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mappings(tensors: Tensors) -> Iterator[str]:
    for part in tensors.parts():
        yield from _mappings(part)
    if isinstance(tensors, Renamed):
        yield from tensors.mapping()


def _bytes(size: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size)
    return int(float(match[1]) * _UNITS[match[2]]) or None if match else None
