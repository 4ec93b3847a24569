from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovl.config.schema import Job, Model
from nanovl.inference.engine import Engine
from nanovl.models.blocks import kernels
from nanovl.models.blocks.attention import AttentionConfig, Scores, attend
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.norm import NormConfig
from nanovl.models.blocks.rope import RopeConfig, RopeScaling
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig
from nanovl.parallelisms.apply import parallelism_mistakes


def random_qkv(
    seed: int = 0, heads: int = 4, kv_heads: int = 2, rows: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 9, n, 16, generator=generator) for n in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def random_mask(rows: int) -> Tensor:
    mask = torch.rand(rows, 1, 9, 9, generator=torch.Generator().manual_seed(3)) > 0.4
    return mask | torch.eye(9, dtype=torch.bool)


def test_a_cap_and_a_sink_by_hand() -> None:
    # one query, two keys of scores 3 and -1 (scale 0.5), cap 2, sink 0.5
    q = torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)
    k = torch.tensor([[3.0, 7.0], [-1.0, 5.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    scores = Scores(scale=0.5, softcap=2.0, sinks=True)
    found = attend(q, k, v, None, scores=scores, sinks_H=torch.tensor([0.5]))
    weights = [math.exp(2 * math.tanh(1.5)), math.exp(2 * math.tanh(-0.5)), math.exp(0.5)]
    expected = torch.tensor(weights[:2]) / sum(weights)
    torch.testing.assert_close(found.flatten(), expected)


def test_temperature_comes_after_the_cap_by_hand() -> None:
    # query at place 8 of a temperature from 4 on: scores 3 and -1, capped, times log 8 / log 4 = 1.5
    scores = Scores(scale=0.5, softcap=2.0, temperature_len=4)
    heat = scores.heat(torch.tensor([[0, 4, 8, 16]]))
    torch.testing.assert_close(heat, torch.tensor([[1.0, 1.0, 1.5, 2.0]]))
    q = torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)
    k = torch.tensor([[3.0, 7.0], [-1.0, 5.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    found = attend(q, k, v, None, scores=scores, heat_BT=torch.tensor([[1.5]]))
    weights = [math.exp(3 * math.tanh(1.5)), math.exp(3 * math.tanh(-0.5))]
    torch.testing.assert_close(found.flatten(), torch.tensor(weights) / sum(weights))


@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
def test_temperature_in_fused_attention_is_that_of_the_formula(heads: tuple[int, int]) -> None:
    qkv, mask = random_qkv(0, *heads), random_mask(2)
    found = [
        attend(*qkv, mask, scores=scores, heat_BT=scores.heat(torch.arange(9).expand(2, 9)))
        for scores in (Scores(kernel=kernel, temperature_len=3) for kernel in ("sdpa", "eager"))
    ]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], kernels.sdpa(*qkv, mask, False, None))


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_eager_equals_fused_attention(heads: tuple[int, int], rows: int) -> None:
    qkv = [x.requires_grad_() for x in random_qkv(0, *heads)]
    mask = random_mask(rows) if rows else None
    outs = [kernel(*qkv, mask, mask is None, 0.3) for kernel in (kernels.sdpa, kernels.eager)]
    torch.testing.assert_close(outs[1], outs[0])
    probe = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((out * probe).sum(), qkv) for out in outs]
    for found, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("has_heat", [False, True])
def test_flex_equals_eager(softcap: float | None, has_sinks: bool, rows: int, has_heat: bool) -> None:
    mask = random_mask(rows) if rows else None
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(2)) if has_sinks else None
    heat = torch.linspace(1, 3, 18).view(2, 9) if has_heat else None
    args = (*random_qkv(), mask, mask is None, 0.3, softcap, sinks, heat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU has no fused form of it
        found = kernels.flex(*args)
    torch.testing.assert_close(found, kernels.eager(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_flex_gradients_equal_eager(rows: int) -> None:
    leaves = [x.cuda().requires_grad_() for x in (*random_qkv(), torch.linspace(-1, 1, 4))]
    mask = random_mask(rows).cuda() if rows else None
    outs = [
        kernel(
            *leaves[:3], mask, mask is None, 0.3, 2.0, leaves[3], torch.linspace(1, 2, 18).view(2, 9).cuda()
        )
        for kernel in (kernels.flex, kernels.eager)
    ]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3)
    probe = torch.randn_like(outs[0])
    for found, expected in zip(
        *(torch.autograd.grad((out * probe).sum(), leaves) for out in outs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_the_kernel_is_the_one_that_can() -> None:
    q, k, v = random_qkv()
    sinks = torch.zeros(4)
    plain = attend(q, k, v, None, is_causal=True)
    assert torch.equal(plain, kernels.sdpa(q, k, v, None, True, None))
    capped = attend(q, k, v, None, is_causal=True, scores=Scores(softcap=2.0))
    assert torch.equal(capped, kernels.eager(q, k, v, None, True, None, 2.0))
    assert Scores(sinks=True, kernel="flex").uncompiled.kernel == "eager"
    assert Scores(kernel="flex").uncompiled.kernel == "sdpa"
    with pytest.raises(AssertionError):
        attend(q, k, v, None, scores=Scores(), sinks_H=sinks)
    with pytest.raises(AssertionError):
        attend(q, k, v, None, scores=Scores(temperature_len=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "sdpa", "sinks": True}, "kernel = 'sdpa': has neither cap nor sinks"),
        ({"kernel": "sdpa", "attn_logit_softcapping": 30.0}, "kernel = 'sdpa': has neither cap nor sinks"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping = 0.0: wants a number above 0"),
        ({"attn_temperature_len": 1}, "attn_temperature_len = 1: wants 2 or more, or none"),
        ({"query_pre_attn_scalar": -2}, "query_pre_attn_scalar = -2: wants a number above 0"),
        ({"rope": RopeConfig(partial_rotary_factor=0.2)}, "rope.partial_rotary_factor = 0.2: wants an even"),
        ({"rope": RopeConfig(theta=0.0)}, "rope.theta = 0.0: wants more than 1"),
        (
            {"rope": RopeConfig(scaling=RopeScaling(kind="yarn", factor=0.5))},
            "rope.scaling.factor = 0.5: wants 1 or more",
        ),
        (
            {"rope": RopeConfig(scaling=RopeScaling(kind="llama3", factor=8.0, high_freq_factor=1.0))},
            "rope.scaling.high_freq_factor = 1.0: wants more than low_freq_factor",
        ),
    ],
)
def test_mistakes_name_the_key(change: dict[str, Any], message: str) -> None:
    config = AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    assert config.mistakes() == []
    wrong = AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16, **change).mistakes()
    assert len(wrong) == 1
    assert wrong[0].startswith(message)


def everything(**attention: Any) -> Decoder:
    """A decoder with the axes that no single family has together."""
    mixer = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **attention}
    rope = RopeConfig(partial_rotary_factor=0.5, scaling=RopeScaling(kind="yarn", factor=4.0))
    mlp = MlpConfig(intermediate_size=32, activation="gelu", bias=True)
    config = DecoderConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=4,
        blocks={
            "sliding": BlockConfig(
                mixer=AttentionConfig(**mixer, sliding_window=5, rope=rope), ffn=mlp, norm_placement="post"
            ),
            "nope": BlockConfig(
                mixer=AttentionConfig(**mixer, rope=None), ffn=mlp, norm_placement="sandwich"
            ),
        },
        pattern=["sliding", "nope"],
        norm=NormConfig(weight="zeros"),
        embed_scale=2.0,
    )
    config.validate()
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


AXES: list[dict[str, Any]] = [
    {"sinks": True, "o_bias": True, "qkv_bias": True},
    {"attn_logit_softcapping": 2.0, "qk_norm": "full"},
    {"sinks": True, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    {"query_pre_attn_scalar": 4, "qk_norm": "head", "attn_temperature_len": 2},
    {"attn_logit_softcapping": 2.0, "attn_temperature_len": 3},
]


@pytest.mark.parametrize("axes", AXES)
def test_packed_documents_equal_separate_ones(axes: dict[str, Any]) -> None:
    model = everything(**axes)
    tokens = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    packed = model(tokens, positions, torch.tensor([[0] * 12 + [1] * 8]))
    separate = torch.cat((model(tokens[:, :12]), model(tokens[:, 12:])), dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", AXES)
def test_the_cache_generates_what_whole_rows_do(axes: dict[str, Any]) -> None:
    model = everything(**axes)
    prompts = [[5, 17, 3], list(range(20, 31))]  # unequal, so that rows are padded
    found = [c.ids for c in Engine(model).generate(prompts, max_tokens=8)]
    for prompt, ids in zip(prompts, found, strict=True):
        row = list(prompt)
        with torch.no_grad():
            for _ in ids:
                row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        assert row[len(prompt) :] == ids


def test_flex_is_refused_where_there_is_no_gpu() -> None:
    config = everything(kernel="flex").config
    with torch.device("meta"):
        model = Decoder(config)
    job = Job(model=Model(name="smollm3"))
    wrong = parallelism_mistakes(model, job, 1, torch.device("cpu"))
    what = "FlexAttention trains on a GPU alone; choose auto or eager"
    assert wrong == [f"model.blocks.{name}.mixer.kernel = 'flex': {what}" for name in config.blocks]
    assert parallelism_mistakes(model, job, 1, torch.device("cuda")) == []
