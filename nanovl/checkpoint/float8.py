"""Weights that lie in 8-bit floats, with a factor for each block, as DeepSeek-V3, Kimi K2 and others are released.

Beside `X.weight` [rows, columns] in float8 lies `X.weight_scale_inv`, one number for each block of `weight_block_size`,
the last ones smaller; the weight is their product, rounded to bfloat16 as in DeepSeek's own conversion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanovl.checkpoint.tensors import Tensors
from nanovl.errors import CheckpointError

SCALE = "_scale_inv"


def dequantized(stored: Tensors, config: Mapping[str, Any]) -> Tensors:
    """`stored` as plain weights, by the `quantization_config` of a config.json.

    Raises CheckpointError for other kinds than fp8 in blocks, and for weights and factors that do not fit together.
    MXFP4 is part of its family's key map.
    """
    said = config.get("quantization_config")
    if not said:
        return stored
    if not isinstance(said, Mapping):
        raise CheckpointError(f"config.json: quantization_config = {said!r}: wants a table; copy it again")
    method, block = said.get("quant_method"), said.get("weight_block_size")
    if method == "mxfp4":
        return stored
    if method != "fp8" or not block:
        raise CheckpointError(
            f"quantization_config in config.json: quant_method = {method!r}, weight_block_size = {block!r} is not read "
            "here; 'fp8' with blocks and 'mxfp4' are; save plain weights, with transformers, and name those"
        )
    return FromBlocks(stored, block)


class FromBlocks(Tensors):
    """Those of `source`, float8 ones times their factors, in bfloat16."""

    def __init__(self, source: Tensors, block: Sequence[int]) -> None:
        self.source, (self.rows, self.columns) = source, block
        there = source.described
        self.scaled = {name for name in there if f"{name}{SCALE}" in there}
        scales = {f"{name}{SCALE}" for name in self.scaled}
        self.described = {
            name: value.to(torch.bfloat16) if name in self.scaled else value
            for name, value in there.items()
            if name not in scales
        }
        if wrong := self._mistakes():
            raise CheckpointError("float8 weights:" + "".join(f"\n  {line}" for line in wrong))

    def read(self, name: str) -> Tensor:
        value = self.source.read(name)
        if name not in self.scaled:
            return value
        factor = self.source.read(f"{name}{SCALE}").float()
        factor = factor.repeat_interleave(self.rows, 0)[: value.shape[0]]
        factor = factor.repeat_interleave(self.columns, 1)[:, : value.shape[1]]
        return (value.float() * factor).bfloat16()

    def parts(self) -> Sequence[Tensors]:
        return (self.source,)

    def _mistakes(self) -> list[str]:
        wrong = []
        for name, value in self.source.described.items():
            if name in self.scaled:
                found = tuple(self.source.described[f"{name}{SCALE}"].shape)
                if value.ndim != 2:
                    wrong.append(f"{name} is {tuple(value.shape)}, and matrices alone have blocks")
                    continue
                blocks = tuple(
                    -(-n // size) for n, size in zip(value.shape, (self.rows, self.columns), strict=True)
                )
                if found != blocks:
                    wrong.append(f"{name}{SCALE} is {found}, {name} has {blocks} blocks")
            elif value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                wrong.append(f"{name} is float8, and {name}{SCALE} is missing")
        return wrong
