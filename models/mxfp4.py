"""MXFP4, four bits a number, as GPT-OSS's released experts are stored (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

import torch
from torch import Tensor

# E experts, R rows, C columns, G blocks of a row, 32 numbers each

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits mean; the fourth is the sign."""


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, R, G, 16] and [E, R, G], both uint8 -> [E, R, C] bfloat16, which holds every such number exactly.

    A byte is two numbers, the first in its lower half; a scale s multiplies its block by 2^(s - 127).
    """
    fours = torch.tensor((*E2M1, *(-value for value in E2M1)), device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack((fours[byte & 15], fours[byte >> 4]), dim=-1)
    experts, rows, groups, size = blocks.shape
    out = torch.empty(experts, rows, groups * 2 * size, dtype=torch.bfloat16, device=blocks.device)
    for expert in range(experts):  # an index takes 4 bytes a byte
        numbers = pairs[blocks[expert].int()].flatten(-2)
        out[expert] = torch.ldexp(numbers, scales[expert, ..., None].int() - 127).flatten(-2)
    return out
