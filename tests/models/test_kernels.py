"""What each attention kernel can do, and that they all compute the same."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovl.config.schema import Job, Model, Parallelism, Training
from nanovl.models.blocks import kernels
from nanovl.models.blocks.attention import AttentionConfig, AttentionCore, MetaBuilder, Scores
from nanovl.models.blocks.mla import MlaConfig
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig
from nanovl.optim.qk_clip import QkClip
from nanovl.parallelisms.apply import parallelism_mistakes

FEATURES: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 5},
    "heat": {"attn_temperature_len": 3},
    "sinks": {"sinks": True},
    "cap": {"attn_logit_softcapping": 2.0},
}
ABLE = {
    "sdpa": {"window", "heat"},
    "eager": {"window", "heat", "sinks", "cap"},
    "flex": {"window", "heat", "sinks", "cap"},
    "varlen": {"window", "heat"},
}
"""Beside documents, which all know. docs/models.md says the same."""
ON_CPU = {"sdpa", "eager"}
ASKED = [set(some) for n in range(5) for some in itertools.combinations(FEATURES, n)]
LENGTHS = [[12, 1, 7], [20]]
"""Documents of two packed rows."""


def decoder(kernel: str, features: set[str], device: str = "cpu") -> Decoder:
    config = DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        blocks={"a": BlockConfig(mixer=mixer(kernel, features), ffn=MlpConfig(intermediate_size=32))},
        pattern=["a"],
    )
    config.validate()
    with torch.device(device):
        model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    if device == "cpu":
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def mixer(kernel: str, features: set[str]) -> AttentionConfig:
    chosen = {key: value for name in features for key, value in FEATURES[name].items()}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return AttentionConfig(**heads, kernel=kernel, **chosen)  # type: ignore[arg-type]


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and document ids of LENGTHS."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    tokens = torch.randint(0, 97, positions.shape, generator=torch.Generator().manual_seed(1))
    return tokens, positions, (positions == 0).cumsum(1)


@pytest.mark.parametrize("features", ASKED, ids=lambda some: "+".join(sorted(some)) or "plain")
@pytest.mark.parametrize("kernel", ABLE)
def test_every_combination_is_computed_or_refused(kernel: str, features: set[str]) -> None:
    mistakes = mixer(kernel, features).mistakes()
    if not features <= ABLE[kernel]:
        assert mistakes == [f"kernel = {kernel!r}: has neither cap nor sinks; choose auto, eager or flex"]
        return
    assert mistakes == []
    for device in ("cpu", "cuda"):
        job = Job(model=Model(name="qwen3"))
        wrong = parallelism_mistakes(decoder(kernel, features, "meta"), job, 1, torch.device(device))
        assert bool(wrong) == (device == "cpu" and kernel not in ON_CPU)
        assert all("trains on a GPU alone; choose auto or eager" in line for line in wrong)
    if kernel == "varlen":
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU has no fused form of flex
        found, expected = (decoder(k, features)(*packed()) for k in (kernel, "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", ASKED, ids=lambda some: "+".join(sorted(some)) or "plain")
def test_auto_is_the_fused_one_where_it_can(features: set[str]) -> None:
    chosen = "sdpa" if features <= ABLE["sdpa"] else "eager"
    with torch.no_grad():
        assert torch.equal(decoder("auto", features)(*packed()), decoder(chosen, features)(*packed()))


@pytest.mark.gpu
@pytest.mark.parametrize("features", ASKED, ids=lambda some: "+".join(sorted(some)) or "plain")
@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_kernels_of_a_gpu_equal_eager(kernel: str, features: set[str]) -> None:
    if not features <= ABLE[kernel]:
        pytest.skip("refused at config time")
    logits, gradients = [], []
    for name in (kernel, "eager"):
        model = decoder(name, features).cuda().bfloat16()
        out = model(*(x.cuda() for x in packed()))
        out.logsumexp(-1).sum().backward()
        logits.append(out)
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(logits[0], logits[1], rtol=3e-2, atol=3e-2)
    for key, gradient in gradients[0].items():
        assert (gradient - gradients[1][key]).norm() <= 3e-2 * gradients[1][key].norm(), key


def test_documents_lie_end_to_end() -> None:
    _, positions, doc_ids = packed()
    starts = kernels.starts_of_documents(positions, doc_ids)
    assert starts.tolist() == [0, 12, 13, 20, 40]
    assert starts.dtype == torch.int32
    assert kernels.starts_of_documents(positions, None).tolist() == [0, 20, 40]


def test_layers_without_masks_have_none_made() -> None:
    model = decoder("varlen", {"window"}, "meta")
    _, positions, doc_ids = packed()
    meta = model.meta(positions, doc_ids)
    assert meta.masks == {}
    assert meta.document_starts.tolist() == [0, 12, 13, 20, 40]
    assert decoder("sdpa", {"window"}).meta(positions, doc_ids).document_starts is None


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch says varlen_attn computes; its own runs on a GPU alone."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for first, end in itertools.pairwise(cu_seq_q.tolist()):
        assert end - first <= max_q
        q, k, v = (x[first:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        distance = torch.arange(end - first)[:, None] - torch.arange(end - first)
        left, right = (end if size == -1 else size for size in window_size)
        score = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        score = score.masked_fill((distance > left) | (-distance > right), float("-inf"))
        out.append((score.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def documented_without_groups(*args: Any, scale: float | None = None, window_size: Any = None) -> Tensor:
    """As of a torch that takes no `enable_gqa`."""
    return documented(*args, scale=scale, window_size=window_size)


@pytest.mark.parametrize("attention", [documented, documented_without_groups])
@pytest.mark.parametrize("features", [some for some in ASKED if some <= ABLE["varlen"]])
def test_varlen_asks_for_what_masks_say(
    features: set[str], attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention)
    with torch.no_grad():
        found, expected = (decoder(k, features)(*packed()) for k in ("varlen", "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_torch_takes_what_varlen_gives() -> None:
    """Shapes alone: torch's operator and its backward on the meta device."""
    q, k, v = (
        torch.empty(2, 20, n, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)
    )
    starts = torch.empty(5, device="meta", dtype=torch.int32)
    out = kernels.varlen(q, k, v, starts, 5, 0.3)
    assert out.shape == q.shape
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v) if x.grad is not None] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize(
    ("config", "widths"),
    [
        (
            AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=12, kernel="varlen"),
            "12 and 12",
        ),
        (
            AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=512, kernel="varlen"),
            "512 and 512",
        ),
        (
            MlaConfig(
                num_attention_heads=4,
                kv_lora_rank=8,
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=16,
                kernel="varlen",
            ),
            "24 and 16",
        ),
    ],
)
def test_heads_that_flash_attention_does_not_take(config: Any, widths: str) -> None:
    assert config.mistakes() == [
        f"kernel = 'varlen': wants keys and values of one width, a multiple of 8 up to 256, not {widths}; choose auto"
    ]


def test_varlen_is_refused_where_masks_or_float32_are_needed() -> None:
    model = decoder("varlen", set(), "meta")
    job = Job(model=Model(name="qwen3"), training=Training(mixed_precision_param="float32"))
    (wrong,) = parallelism_mistakes(model, job, 1, torch.device("cuda"))
    assert wrong.startswith("model.blocks.a.mixer.kernel = 'varlen': FlashAttention knows no float32")
    for method in ("allgather", "ring", "ulysses"):
        cut = Parallelism(context_parallel_degree=2, context_parallel_method=method)  # type: ignore[arg-type]
        job = Job(model=Model(name="qwen3"), parallelism=cut)
        (wrong,) = parallelism_mistakes(model, job, 2, torch.device("cuda"))
        assert wrong.startswith(
            "model: kernel = 'varlen' makes no masks, by which parallelism.context_parallel"
        )
    with pytest.raises(Exception, match="kernel = 'varlen' makes no masks, which say whose logits count"):
        QkClip(decoder("varlen", set()), 100.0)
    core = AttentionCore(None, 2, 16, Scores(kernel="varlen"))
    assert core.scores.uncompiled.kernel == "sdpa"
    assert MetaBuilder(()).finds_documents is False
