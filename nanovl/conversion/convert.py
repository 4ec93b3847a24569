"""`nanovl.convert`: a model in one format -> the same model in another, tensor by tensor."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovl.checkpoint.hf import kinds, main_dtype
from nanovl.checkpoint.locate import find_source
from nanovl.checkpoint.tensors import Counted, InDtype, Renamed, Tensors
from nanovl.conversion.hf_directory import HuggingFaceTarget
from nanovl.conversion.nanochat_files import NanochatTarget
from nanovl.conversion.ours import DcpTarget, PlainTarget, RunTarget
from nanovl.conversion.target import MTP, Model, Target
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
    shard_size: int | str | None = None,
    without_mtp: bool = False,
    text_only: bool = False,
) -> Path:
    """Write the model at `src` to the new folder `dst` as `to`: hf, run, dcp (a checkpoint), safetensors or nanochat.

    `dtype` is that of written parameters; None = as they are stored. `shard_size`, for hf, is the most that one file
    holds, in bytes or as "500MB" (5GB). `without_mtp` leaves modules of multi-token prediction away, `text_only` all
    but the language model of a directory with images or sound. Returns `dst`.
    Raises CheckpointError with every weight that does not fit, ConfigError, RunError; then nothing is written.
    """
    require_new(Path(dst))
    plan(src, to=to, dtype=dtype, shard_size=shard_size, without_mtp=without_mtp, text_only=text_only).write(
        Path(dst)
    )
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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(value.nbytes for value in self.tensors.described.values())

    def write(self, dst: Path, count: Callable[[int], None] = lambda nbytes: None) -> None:
        """Write the new folder `dst`; `count` is told the bytes of each tensor.

        Raises RunError where it is in use, CheckpointError where there is no room for it or writing fails.
        """
        try:
            free = shutil.disk_usage(next(p for p in dst.absolute().parents if p.exists())).free
            if free < self.nbytes:
                raise CheckpointError(
                    f"{dst}: wants {self.nbytes / 1e9:,.1f} GB, of which {free / 1e9:,.1f} are free there; make room"
                )
            with new_folder(dst) as draft:
                self.target.write(self.model, Counted(self.tensors, count), draft, dst)
        except OSError as error:
            left = "" if dst.exists() else "; nothing is left of it"
            raise CheckpointError(f"{dst}: cannot be written: {error}{left}") from error

    def mapping(self) -> list[str]:
        """A line for each group of tensors: names as read and as written, shapes and dtypes as written. Then what is
        left away."""
        tables = [part for part in _renamed(self.tensors) if any(g.theirs != g.ours for g in part.groups)]
        lines = []
        for part in tables or _renamed(self.tensors)[:1]:
            title = "reading:" if part.to_ours else "writing:"
            written = self.model.weights if part.to_ours else self.tensors
            lines += [*([title] if len(tables) > 1 else []), *part.mapping(written.described)]
        return [
            *lines,
            *(f"{name} -> left away" for names in self.model.left_away.values() for name in names),
        ]

    def summary(self) -> str:
        """One line: what is written, how much, in which dtype."""
        values = self.tensors.described.values()
        main = main_dtype(self.model.weights)
        others = sum(value.dtype != main for value in values)
        chosen = "as stored" if self.dtype is None else "as asked"
        named = f"{str(main).removeprefix('torch.')}, {chosen}"
        more = f"; {others} tensors in other dtypes" if others else ""
        for kind, names in self.model.left_away.items():
            more += f"; {len(names)} tensors of {kind} left away"
        size = self.nbytes / 1e6
        return f"{self.model.spec.family.name}: {len(values)} tensors, {size:,.1f} MB, {named}{more}"


def plan(
    src: str | Path,
    *,
    to: str,
    dtype: str | torch.dtype | None = None,
    shard_size: int | str | None = None,
    without_mtp: bool = False,
    text_only: bool = False,
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
    if (shard_bytes := _bytes(SHARD_SIZE if shard_size is None else shard_size)) is None:
        wrong.append(f"shard_size = {shard_size!r}: wants a size above 0 such as 500MB or 5GB")
    if wrong:
        raise ConfigError(wrong)
    assert shard_bytes is not None
    source, left_away = find_source(Path(src)), dict[str, Sequence[str]]()
    if text_only:
        source, left_away["images or sound"] = source.text_only()
    if without_mtp:
        source, left_away[MTP] = source.without_mtp()
    wanted = None if dtype is None else getattr(torch, named)
    weights = InDtype(source.weights(source.spec), kinds(source.spec, wanted))
    model = Model(source, source.spec, weights, load_tokenizer(source.tokenizer), shard_bytes, left_away)
    target = TARGETS[to]()
    return Plan(model, target, target.tensors(model), wanted)


def require_new(dst: Path) -> None:
    """Raises RunError where something is in the way of a new folder."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise RunError(f"{dst} is in use; name a new folder")


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A draft to write into, which becomes `dst` in one rename once all is on disk, or vanishes.

    What a killed conversion left under the draft's name is removed by the next one; one that is at work holds a lock.
    """
    draft = dst.absolute().with_name(f".{dst.absolute().name}.unfinished")
    draft.mkdir(parents=True, exist_ok=True)
    lock = os.open(draft, os.O_RDONLY)
    try:
        _lock(lock, dst)
        try:
            require_new(dst)  # it may have come while others held the lock
            for path in draft.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield draft
            for path in (*draft.rglob("*"), draft):
                _flush(path)
            draft.rename(dst)
        except BaseException:
            if draft.exists():
                shutil.rmtree(draft)
            raise
        _flush(draft.parent)
    finally:
        os.close(lock)


def _lock(folder: int, dst: Path) -> None:
    """Until it is closed, or its process ends. Raises RunError where another one holds it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{dst}: another conversion is writing it; wait, or name another folder") from None


def _flush(path: Path) -> None:
    """To disk, a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _renamed(tensors: Tensors) -> list[Renamed]:
    """The key maps that tensors pass, in order."""
    before = [found for part in tensors.parts() for found in _renamed(part)]
    return [*before, tensors] if isinstance(tensors, Renamed) else before


def _bytes(size: int | str) -> int | None:
    if not isinstance(size, str):
        return size if size > 0 else None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.upper())
    return int(float(match[1]) * _UNITS[match[2]]) or None if match else None
