"""A checkpoint is a committed directory.

    step_000500/  state/        DCP shards of weights and optimizer state, readable on any mesh; where `nanovl convert`
                                was asked for it, model.safetensors instead, weights alone under our names
                  ranks/        rank_00000.json.gz: what each process kept for itself (data lanes, random state)
                  tokenizer/    config.json
                  meta.json     step, architecture, tokenizer hash, mesh, where it came from

It is written as step_000500.tmp, flushed to disk, and renamed once every rank is done. A killed process leaves a .tmp,
which no one reads and the next run removes. A directory is never written twice: DCP would mix old and new shards.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from nanovl.checkpoint.safetensors_files import write_safetensors
from nanovl.checkpoint.state import MODEL, Reader, read_metadata, read_state, write_state
from nanovl.checkpoint.tensors import Tensors
from nanovl.dist import all_reduce, barrier
from nanovl.errors import CheckpointError
from nanovl.log import Log

_NAME = re.compile(r"step_(\d+)")
_FLAT = StateDictOptions(
    flatten_optimizer_state_dict=True
)  # keyed by parameter name, so it moves between meshes
_CHECKED = StateDictOptions(
    strict=False
)  # names have been compared already; a tied weight has one of its two


def committed(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / "meta.json").is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps taken when `checkpoint` was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json. Raises CheckpointError where it is absent or broken."""
    try:
        meta = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:  # JSON and UTF-8 errors are both ValueErrors
        raise CheckpointError(
            f"{checkpoint}: not a complete checkpoint: meta.json: {error}; choose another step"
        ) from None
    return meta


def resumable_meta(checkpoint: Path) -> dict[str, Any]:
    """The same of a checkpoint that training can go on from. Raises CheckpointError where it holds weights alone."""
    meta = read_meta(checkpoint)
    if meta.get("weights_only"):
        raise CheckpointError(
            f"{checkpoint}: was converted, so it holds no optimizer and no place in the data to resume from; "
            "start a new run with checkpoint.initial_load_path"
        )
    return meta


@dataclass(frozen=True)
class Restored:
    """What `load` gives back besides filling model and optimizers."""

    meta: dict[str, Any]
    ranks: list[dict[str, Any]]
    """What every process of the saving run kept, by rank."""


class Checkpointer:
    """Saves and restores one run's model, optimizers and per-rank state in `folder`."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        keep: int,
        background: bool,
        log: Log,
    ) -> None:
        """`keep` checkpoints stay (0 = all); `background` writes while training goes on. Removes what a kill left."""
        self.folder, self.model, self.optimizers = folder, model, list(optimizers)
        self.keep, self.log = keep, log
        self.rank = dist.get_rank()
        # its own group: the writing thread must not share a group with training's collectives
        self.group = dist.new_group(backend="gloo") if background else None
        self.pending: Future[Any] | None = None
        self.settled = threading.Event()
        self.failure: BaseException | None = None
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover)
        barrier()

    def save(
        self, step: int, meta: Mapping[str, Any], rank_state: Mapping[str, Any], files: Sequence[Path]
    ) -> Path:
        """Write everything after `step` optimizer steps, with copies of `files`. All ranks call it."""
        self.wait()
        final = self.folder / f"step_{step:06d}"
        if final.exists():
            return final
        draft = final.with_suffix(".tmp")
        if self.rank == 0:
            _copy_all(files, draft)
            _write(draft / "meta.draft.json", json.dumps({**meta, "step": step}, indent=2).encode())
        barrier()
        _write(
            draft / "ranks" / f"rank_{self.rank:05d}.json.gz",
            gzip.compress(json.dumps(rank_state).encode(), 1),
        )
        barrier()  # every rank's file is there before rank 0 can commit
        state = {"model": _model_state(self.model), "optimizer": self._optimizer_state()}
        if self.group is None:
            save_state(state, checkpoint_id=draft / "state")
            self._commit(draft, final)
            barrier()
        else:
            written: Any = async_save(state, checkpoint_id=draft / "state", process_group=self.group)
            self.pending = written
            # rank 0's write ends with the metadata it gathers from all ranks, so when it is done everybody is
            self.settled.clear()
            written.add_done_callback(lambda done: self._settle(done, draft, final))
        return final

    def wait(self) -> None:
        """Until the checkpoint being written is committed. Raises what its writing raised."""
        if self.pending is not None:
            self.settled.wait()  # a future's waiters wake before its callbacks have run
            self.pending = None
            if self.failure is not None:
                raise CheckpointError(
                    f"{self.folder}: writing a checkpoint failed: {self.failure!r}"
                ) from self.failure
            barrier()

    def load(self, checkpoint: Path, fresh: Collection[str] = (), unused: Collection[str] = ()) -> Restored:
        """Fill model and optimizers from `checkpoint`, of any mesh, but for the model's tensors called `fresh`; it may
        have more, called `unused`. Raises CheckpointError with every other key at fault."""
        meta = resumable_meta(checkpoint)
        state = {"model": _model_state(self.model, fresh), "optimizer": self._optimizer_state()}
        _read_state(checkpoint, state, whole=True, unused=unused)
        set_model_state_dict(self.model, state["model"], options=_CHECKED)
        if self.optimizers:
            set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"], options=_FLAT)
        return Restored(meta, read_rank_states(checkpoint))

    def _optimizer_state(self) -> dict[str, Any]:
        if not self.optimizers:  # a pipeline stage in which nothing is trained
            return {}
        return get_optimizer_state_dict(self.model, self.optimizers, options=_FLAT)

    def _settle(self, written: Future[Any], draft: Path, final: Path) -> None:
        try:
            written.result()
            self._commit(draft, final)
        except BaseException as error:  # a future drops what its callbacks raise; wait() raises it
            self.failure = error
        self.settled.set()

    def _commit(self, draft: Path, final: Path) -> None:
        if self.rank == 0:
            _publish(draft, final)
            for old in committed(self.folder)[: -self.keep] if self.keep else []:
                shutil.rmtree(old)


def save_weights(folder: Path, weights: Tensors, meta: Mapping[str, Any], *, plain: bool) -> None:
    """Make `folder` a checkpoint of `weights` alone, from one process; training cannot resume from it.

    They lie in DCP, or `plain` in model.safetensors. meta.json comes last: before it there is no checkpoint.
    """
    if plain:
        write_safetensors(folder, weights, sys.maxsize, {})
    else:
        write_state(folder / "state", weights)
    _write(folder / "meta.json", json.dumps(meta, indent=2).encode())
    _flush_folder(folder)


def load_weights(
    checkpoint: Path, model: nn.Module, fresh: Collection[str] = (), unused: Collection[str] = ()
) -> None:
    """Fill `model` alone, but for the tensors called `fresh`, from `checkpoint`, of any mesh, whose tensors called
    `unused` it lacks. Raises CheckpointError listing every other key at fault."""
    state = {"model": _model_state(model, fresh)}
    _read_state(checkpoint, state, whole=False, unused=unused)
    set_model_state_dict(model, state["model"], options=_CHECKED)


def read_rank_states(checkpoint: Path) -> list[dict[str, Any]]:
    """What every process of the saving run kept, by rank."""
    states = []
    for file in sorted((checkpoint / "ranks").glob("rank_*.json.gz")):
        try:
            states.append(json.loads(gzip.decompress(file.read_bytes())))
        except (OSError, EOFError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}; choose an earlier step") from None
    return states


def _model_state(model: nn.Module, but: Collection[str] = ()) -> dict[str, Any]:
    """Weights and buffers by name, a tied weight under its first name only, without those called `but`."""
    state = get_model_state_dict(model)
    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return {name: value for name, value in state.items() if name not in tied and name not in but}


def _read_state(
    checkpoint: Path, state: dict[str, Any], *, whole: bool, unused: Collection[str] = ()
) -> None:
    """dcp.load into `state`, after comparing names and shapes; `whole` = some rank must want every stored key, else
    every one of the model; in both cases but the model's `unused`.

    All ranks raise if one has to.
    """
    reader = Reader(checkpoint / "state")
    stored = read_metadata(reader, checkpoint / "state").state_dict_metadata
    wanted = {f"{part}.{key}": value for part, values in state.items() for key, value in values.items()}
    wrong = [f"missing {key}" for key in wanted if key not in stored]
    left = {MODEL + name for name in unused}
    known = [key for key in sorted(stored) if (whole or key.startswith(MODEL)) and key not in left]
    wrong += [f"unexpected {key}" for key in _wanted_nowhere(known, wanted)]
    for key, value in wanted.items():
        size = getattr(stored.get(key), "size", None)
        if size is not None and isinstance(value, torch.Tensor) and tuple(size) != tuple(value.shape):
            wrong.append(f"{key} is {tuple(size)}, the model wants {tuple(value.shape)}")
    wrong = _of_all_ranks(wrong)
    if wrong:
        listed = "".join(f"\n  {line}" for line in wrong)
        raise CheckpointError(f"{checkpoint} does not fit the model:{listed}")
    read_state(checkpoint / "state", state, reader, no_dist=not dist.is_initialized())


def _wanted_nowhere(keys: Sequence[str], wanted: Collection[str]) -> list[str]:
    """The keys that no rank wants: stages of a pipeline want different ones."""
    is_wanted = all_reduce(torch.tensor([key in wanted for key in keys], dtype=torch.uint8), "max")
    return [key for key, here in zip(keys, is_wanted.tolist(), strict=True) if not here]


def _of_all_ranks(lines: list[str]) -> list[str]:
    """Every rank's lines, each once."""
    if not dist.is_initialized():
        return lines
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, lines)
    return list(dict.fromkeys(line for theirs in everyone for line in theirs))


def _publish(draft: Path, final: Path) -> None:
    """Make the draft the checkpoint, in one rename."""
    (draft / "meta.draft.json").rename(draft / "meta.json")
    for folder in (draft / "ranks", draft):
        _flush_folder(folder)
    draft.rename(final)
    _flush_folder(final.parent)


def _copy_all(files: Sequence[Path], into: Path) -> None:
    into.mkdir(parents=True)
    for file in files:
        if file.is_dir():
            shutil.copytree(file, into / file.name)
        else:
            shutil.copy(file, into / file.name)


def _write(file: Path, data: bytes) -> None:
    """Write and flush to disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
