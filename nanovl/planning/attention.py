"""Attention as on a GPU: the kernel that torch would choose there, keeping what it keeps, on tensors without memory.

torch's own operators are called, whose gradients and shapes do not ask for the device. The choice among them is that
of torch 2.13 with the cuDNN it brings along (sdp_utils.cpp; 2.14 will group heads in the third as well):

    cuDNN        capability 9 and 10, in 16 bits; heads of 128 channels at most, or 192 with values of 128
    flash        in 16 bits, without a mask; values as wide as keys, 256 channels at most
    efficient    as many key as query heads
    math         everything: the formula, with all scores in float32
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nanovl.models.blocks import kernels
from nanovl.models.blocks.attention import AttentionCore
from nanovl.models.blocks.indexer import chunks
from nanovl.models.blocks.sparse_core import IndexLoss, SparseCore
from nanovl.planning.ledger import Ledger

# B batch, H query heads, T query tokens, S key tokens, D head channels

Capability = tuple[int, int]
Fused = Literal["cudnn", "flash", "efficient", "math"]


def attend_as_on(capability: Capability, part: nn.Module, *, deterministic: bool) -> None:
    """Let the attention cores of `part` believe that they are on such a GPU."""
    for module in part.modules():
        if isinstance(module, SparseCore | IndexLoss):
            module.chunks = in_few
    for core in (module for module in part.modules() if isinstance(module, AttentionCore)):
        core.forward = _under(GpuAttention(capability, deterministic=deterministic), core.forward)  # type: ignore[method-assign]


def _under(mode: TorchFunctionMode, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # around each core: no such mode survives into what backward recomputes
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with mode:
            return forward(*args, **kwargs)

    return run


def in_few(tokens: int, numbers_a_token: int) -> Iterator[slice]:
    """The chunks of an indexer, most of them as one, which is not looked at: chunks of one size cost the same, and no
    more is alive than in the last. Long rows have thousands."""
    pieces = list(chunks(tokens, numbers_a_token))
    (ledger,) = (mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Ledger))
    if len(pieces) > 4:
        ledger.looks = False
        yield slice(0, pieces[-4].stop)
        yield pieces[-3]  # what the large one left behind goes here
        ledger.looks = True
        pieces = pieces[-2:]
    yield from pieces


class GpuAttention(TorchFunctionMode):
    """While it is entered, tensors say that they are on a GPU of `capability`, and attention is that GPU's."""

    def __init__(self, capability: Capability, *, deterministic: bool) -> None:
        super().__init__()
        self.capability = capability
        self.deterministic = deterministic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is kernels.fused_flex:
            return _Flex.apply(*args[:3], *_captured(args[3]))
        return func(*args, **kwargs)

    def _sdpa(
        self,
        q_BHTD: Tensor,
        k_BHSD: Tensor,
        v_BHSD: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        qkv, aten = (q_BHTD, k_BHSD, v_BHSD), torch.ops.aten
        kernel = chosen(self.capability, *qkv, masked=attn_mask is not None, deterministic=self.deterministic)
        if kernel == "math":
            return aten._scaled_dot_product_attention_math(
                *qkv, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        if kernel == "flash":
            missing = -q_BHTD.shape[-1] % 8
            padded = [F.pad(x, (0, missing)) for x in qkv] if missing else qkv
            out = aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal, False, scale=scale)[0]
            return out[..., : v_BHSD.shape[-1]]
        # of a mask that says what is visible each call makes one that is added, and keeps it
        bias = None if attn_mask is None else torch.where(attn_mask, 0.0, float("-inf")).to(q_BHTD.dtype)
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(
                *qkv, bias, True, 0.0, is_causal, False, scale=scale
            )[0]
        return aten._scaled_dot_product_efficient_attention(*qkv, bias, True, 0.0, is_causal, scale=scale)[0]


def chosen(
    capability: Capability,
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    *,
    masked: bool,
    deterministic: bool = False,
) -> Fused:
    """What scaled_dot_product_attention runs in training, from capability 8.0 on."""
    width, value_width = q_BHTD.shape[-1], v_BHSD.shape[-1]
    low, grouped = q_BHTD.dtype != torch.float32, q_BHTD.shape[1] != k_BHSD.shape[1]
    even = width % 8 == value_width % 8 == 0
    fits_cudnn = max(width, value_width) <= 128 or (width, value_width) == (192, 128)
    if capability[0] in (9, 10) and low and even and fits_cudnn and not deterministic:
        return "cudnn"
    # its backward needs more shared memory than these have
    too_wide = capability in ((8, 6), (8, 9), (12, 0), (12, 1)) and 192 < width <= 224
    if low and not masked and width == value_width <= 256 and not too_wide:
        return "flash"
    aligned = even or (not low and width % 4 == value_width % 4 == 0)
    return "efficient" if aligned and not grouped else "math"


class _Flex(torch.autograd.Function):
    """What FlexAttention keeps: its inputs, its output and the log-sum-exp, laid out as the queries."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *captured: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, _ = q_BHTD.shape
        out_BHTD = q_BHTD.new_empty(batch, tokens, heads, v_BHSD.shape[-1]).transpose(1, 2)
        lse_BHT = q_BHTD.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q_BHTD, k_BHSD, v_BHSD, out_BHTD, lse_BHT, *captured)
        return out_BHTD, lse_BHT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q_BHTD, k_BHSD, v_BHSD, _, _, *captured = ctx.saved_tensors
        return (*map(torch.empty_like, (q_BHTD, k_BHSD, v_BHSD)), *(None for _ in captured))


def _captured(score_mod: Any) -> list[Tensor]:
    """Tensors that a function of scores reads beside them."""
    cells = [cell.cell_contents for cell in score_mod.__closure__]
    return [value for value in cells if isinstance(value, Tensor)]
