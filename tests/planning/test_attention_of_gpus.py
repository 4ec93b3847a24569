"""What attention keeps for backward on a GPU, in bytes worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nanovl.models.blocks import indexer
from nanovl.models.blocks.attention import Scores, attend
from nanovl.planning import attention
from nanovl.planning.attention import Capability, GpuAttention, chosen
from nanovl.planning.estimate import question
from nanovl.planning.hardware import GPUS
from nanovl.planning.ledger import Ledger
from nanovl.planning.rank import plan_rank
from nanovl.registry import read_job

A100, H100, RTX_4090 = (8, 0), (9, 0), (8, 9)
B, T, H = 2, 64, 8


def made_and_kept(capability: Capability, heads: tuple[int, int, int], masked: bool, **how: Any) -> int:
    """Bytes alive between forward and backward beside queries, keys, values, mask and sinks; `heads` = key heads,
    channels of queries and keys, of values."""
    kv_heads, width, value_width = heads
    scores = Scores(**how)
    with FakeTensorMode(), Ledger() as ledger, GpuAttention(capability, deterministic=False):
        q, k = (torch.empty(B, T, n, width, dtype=torch.bfloat16) for n in (H, kv_heads))
        v = torch.empty(B, T, kv_heads, value_width, dtype=torch.bfloat16)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        mask = torch.ones(B, 1, T, T, dtype=torch.bool) if masked else None
        sinks = torch.zeros(H, requires_grad=True) if scores.sinks else None
        before = ledger.live
        out = attend(q, k, v, mask, is_causal=mask is None, scores=scores, sinks_H=sinks)
        assert out.shape == (B, T, H, value_width)
        flat = out.flatten(2)  # as what follows attention sees it; no copy
        kept = ledger.live - before
        flat.sum().backward()
        assert [x.grad.shape for x in leaves if x.grad is not None] == [x.shape for x in leaves]
    return kept


LSE, BIAS = 4 * B * H * T, 2 * B * T * T
SEEDS = 64
"""States of random numbers, though nothing is dropped out."""


@pytest.mark.parametrize("capability", [A100, H100])
def test_latent_attention_keeps_its_output_and_one_number_a_query(capability: Capability) -> None:
    """Values are narrower than keys, as DeepSeek-V3's, and no scores are kept."""
    out = 2 * B * T * H * 128
    plain, masked = (made_and_kept(capability, (H, 192, 128), masked) for masked in (False, True))
    assert out + LSE <= plain <= out + LSE + SEEDS
    assert masked - plain == pytest.approx(BIAS, abs=SEEDS)


@pytest.mark.parametrize("capability", [A100, H100, RTX_4090])
def test_with_a_mask_grouped_heads_are_kept_one_by_one(capability: Capability) -> None:
    out, copies = 2 * B * T * H * 64, 2 * 2 * B * T * H * 64
    plain, masked = (made_and_kept(capability, (2, 64, 64), masked) for masked in (False, True))
    assert out + LSE <= plain <= out + LSE + SEEDS
    assert masked - plain == pytest.approx(BIAS + copies, abs=SEEDS)


def test_sinks_keep_what_flex_attention_does() -> None:
    """GPT-OSS: the output before and after it is scaled, its log-sum-exp, and the share of what is no sink, twice."""
    out, share = 2 * B * T * H * 64, 4 * B * H * T
    assert made_and_kept(H100, (2, 64, 64), True, sinks=True) == 2 * out + LSE + share + share // 2
    assert made_and_kept(H100, (2, 64, 64), True, softcap=30.0) == out + LSE


def test_eager_keeps_scores() -> None:
    """At least the weights of all heads."""
    assert made_and_kept(H100, (2, 64, 64), True, kernel="eager") > (4 + 2) * B * H * T * T


@pytest.mark.parametrize(
    ("capability", "widths", "kv_heads", "masked", "expected"),
    [
        (H100, (128, 128), 2, True, "cudnn"),
        (H100, (192, 128), H, False, "cudnn"),
        (H100, (256, 256), 2, False, "flash"),
        (H100, (256, 256), 2, True, "math"),
        (H100, (256, 256), H, True, "efficient"),
        (A100, (128, 128), 2, False, "flash"),
        (A100, (128, 128), 2, True, "math"),
        (A100, (192, 128), H, False, "efficient"),
        (A100, (100, 100), 2, False, "flash"),
        (A100, (100, 100), H, True, "math"),
        (A100, (224, 224), H, False, "flash"),
        (RTX_4090, (224, 224), H, False, "efficient"),
        (RTX_4090, (256, 256), H, False, "flash"),
    ],
)
def test_kernel_is_the_one_torch_would_choose(
    capability: Capability, widths: tuple[int, int], kv_heads: int, masked: bool, expected: str
) -> None:
    def heads(number: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(1, number, 4, width, dtype=dtype, device="meta")

    def found(dtype: torch.dtype, **how: Any) -> str:
        q, k, v = (
            heads(n, w, dtype) for n, w in ((H, widths[0]), (kv_heads, widths[0]), (kv_heads, widths[1]))
        )
        return chosen(capability, q, k, v, masked=masked, **how)

    assert found(torch.bfloat16) == expected
    assert found(torch.bfloat16, deterministic=True) != "cudnn"
    assert found(torch.float32) == ("efficient" if kv_heads == H else "math")


@pytest.mark.parametrize("mode", ["none", "full"])
def test_few_chunks_of_an_indexer_stand_for_all(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 chunks of queries 4 are run, and 13 as one that is not looked at."""
    config = Path(__file__).parents[2] / "configs" / "debug.toml"
    flags = ["--model.name=deepseek_v32", "--model.flavor=debug", "--model.num_hidden_layers=2"]
    job = read_job([config], [*flags, f"--activation_checkpoint.mode={mode}"])
    asked = question(job, 1, GPUS["NVIDIA H100 80GB HBM3"])
    rows, heads, keys = 2, 16, 128
    monkeypatch.setattr(indexer, "NUMBERS_AT_ONCE", 8 * rows * heads * keys)
    few = plan_rank(asked, 0)
    monkeypatch.setattr(attention, "in_few", indexer.chunks)
    assert plan_rank(asked, 0) == few
