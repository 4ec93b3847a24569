"""safetensors cut for tensor ranks: `*-TP-000.safetensors`, ... beside `*-TP-common.safetensors`, and no index.

A rank's files hold its slice of each tensor that is cut, under the same name on all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanovl.checkpoint.safetensors_files import SafetensorsFolder
from nanovl.checkpoint.tensors import Tensors
from nanovl.errors import CheckpointError

_FILE = re.compile(r".*-TP-(common|\d{3})\.safetensors")


def is_cut(folder: Path) -> bool:
    """Whether the files in `folder` are such."""
    return bool(_files(folder))


class CutFolder(Tensors):
    """The whole tensors of such a folder: one is read at a time, slice by slice."""

    def __init__(self, folder: Path, cut_dim: Callable[[str], int | None]) -> None:
        """`cut_dim` of a name = the dimension in which its slices follow each other; None = it is never cut.

        Raises CheckpointError listing every rank, tensor and slice at fault.
        """
        files, self.cut_dim = _files(folder), cut_dim
        self.common = SafetensorsFolder(folder, files.pop("common", []))
        self.ranks = [SafetensorsFolder(folder, files[rank]) for rank in sorted(files)]
        wrong = _mistakes(sorted(files), self.common, self.ranks, cut_dim)
        if wrong:
            raise CheckpointError(f"{folder}: copy it again:" + "".join(f"\n  {line}" for line in wrong))
        cut = self.ranks[0].described if self.ranks else {}
        whole = {name: self._joined(name, [rank.described[name] for rank in self.ranks]) for name in cut}
        self.described = {**self.common.described, **whole}

    def read(self, name: str) -> Tensor:
        if name in self.common.described:
            return self.common.read(name)
        return self._joined(name, [rank.read(name) for rank in self.ranks])

    def _joined(self, name: str, slices: list[Tensor]) -> Tensor:
        dim = self.cut_dim(name)
        assert dim is not None
        return torch.cat(slices, dim)


def _files(folder: Path) -> dict[str, list[Path]]:
    """Rank, or common -> its files."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*-TP-*.safetensors")):
        if match := _FILE.fullmatch(file.name):
            found.setdefault(match[1], []).append(file)
    return found


def _mistakes(
    numbers: list[str],
    common: Tensors,
    ranks: list[SafetensorsFolder],
    cut_dim: Callable[[str], int | None],
) -> list[str]:
    wrong = []
    if numbers != (wanted := [f"{rank:03d}" for rank in range(len(numbers))]):
        wrong.append(f"there are files of ranks {', '.join(numbers)}, and not of {', '.join(wanted)}")
    names = {name for rank in ranks for name in rank.described}
    for name in sorted(names):
        if name in common.described:
            wrong.append(f"{name} is in files of ranks and in common ones")
        if cut_dim(name) is None:
            wrong.append(f"{name} is in files of ranks, and how it is cut is not known")
        shapes = [
            tuple(rank.described[name].shape) if name in rank.described else "missing" for rank in ranks
        ]
        if len(set(shapes)) > 1:
            wrong.append(f"{name} is {', '.join(map(str, shapes))} on the ranks, which wants equal slices")
    return wrong
