"""nanochat against the published sizes and against a second writing of its forward pass, straight from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nanovl.errors import ConfigError
from nanovl.models.nanochat import Nanochat, NanochatConfig
from nanovl.models.nanochat_v1 import FAMILY as V1

TINY = NanochatConfig(
    vocab_size=61,
    depth=5,
    aspect_ratio=8,
    head_dim=8,
    max_position_embeddings=16,
    short_window_multiple=4,
    smear_channels=6,
    value_gate_channels=4,
)


def tiny(seed: int = 0, **changes: object) -> Nanochat:
    model = Nanochat(NanochatConfig(**{**vars(TINY), **changes}))  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # zero outputs at init would hide every mistake
        parameter.data.normal_(std=0.3, generator=g)
    return model


@pytest.mark.parametrize(
    ("depth", "total", "training_flops"),
    [
        (6, 73_531_538, 1.675108e8),
        (8, 125_829_354, 2.956997e8),
        (12, 286_261_730, 7.596960e8),
        (20, 896_533_746, 2.886213e9),
        (24, 1_384_122_122, 4.775226e9),
        (32, 2_818_575_450, 1.077099e10),
    ],
)
def test_sizes_equal_the_released_code(depth: int, total: int, training_flops: float) -> None:
    with torch.device("meta"):
        model = Nanochat(NanochatConfig(depth=depth, vocab_size=32768))
    assert sum(p.numel() for p in model.parameters()) == total
    # its own count: windows without the token itself, no causal factor
    flops = 3 * model.forward_flops_per_token(lambda window: 2048 if window is None else window - 1)
    assert flops == pytest.approx(training_flops, rel=1e-6)


@pytest.mark.parametrize(
    ("flavor", "total"), [("d20", 560_988_160), ("d26", 1_081_999_360), ("d32", 1_879_048_192)]
)
def test_first_release_sizes(flavor: str, total: int) -> None:
    with torch.device("meta"):
        model = V1.model(V1.flavors[flavor]())
    assert sum(p.numel() for p in model.parameters()) == total


def test_short_window_of_the_released_context() -> None:
    config = NanochatConfig(depth=12)
    assert config.short_window == 513  # 512 earlier keys and the token itself
    assert [config.window(i) for i in range(12)] == [513, 513, 513, None] * 2 + [513, 513, 513, None]
    assert NanochatConfig(depth=5).window(4) is None
    assert [i for i in range(6) if NanochatConfig(depth=6).has_value_embedding(i)] == [1, 3, 5]


def written_again(model: Nanochat, tokens: torch.Tensor) -> torch.Tensor:
    """The forward pass for one document [T], token by token where that is the definition."""
    c, w = model.config, {n: p.detach() for n, p in model.named_parameters()}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + c.norm_eps)

    length, heads, dim = len(tokens), c.num_attention_heads, c.head_dim
    x = norm(w["embed_tokens.weight"][tokens])
    gate = w["smear.scale"] * torch.sigmoid(x[:, : c.smear_channels] @ w["smear.gate.weight"].T)
    x = torch.stack([x[t] + (gate[t] * x[t - 1] if t else 0) for t in range(length)])
    x0, middle = x, x
    frequency = c.rope_theta ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.arange(length)[:, None] * frequency

    def turn(z: torch.Tensor) -> torch.Tensor:
        a, b, cos, sin = z[..., : dim // 2], z[..., dim // 2 :], angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    for i in range(c.depth):
        p = f"layers.{i}."
        x = w[f"{p}blend.stream"] * x + w[f"{p}blend.embedding"] * x0
        h = norm(x)
        q, k, v = ((h @ w[f"{p}mixer.{n}_proj.weight"].T).view(length, heads, dim) for n in "qkv")
        if i % 2 == (c.depth - 1) % 2:
            g = c.value_gate_scale * torch.sigmoid(
                h[:, : c.value_gate_channels] @ w[f"{p}mixer.value_gate.weight"].T
            )
            v = v + g[..., None] * w[f"{p}mixer.value_embed.weight"][tokens].view(length, heads, dim)
        q, k = norm(turn(q)) * c.qk_scale, norm(turn(k)) * c.qk_scale
        out = torch.zeros(length, heads, dim)
        window = 10**9 if i % 4 == 3 or i == c.depth - 1 else 4  # ceil to 4 of 16 / 4
        for t in range(length):
            first = max(0, t - window)
            scores = torch.einsum("hd,shd->hs", q[t], k[first : t + 1]) / math.sqrt(dim)
            out[t] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[first : t + 1])
        x = x + out.flatten(1) @ w[f"{p}mixer.o_proj.weight"].T
        x = x + F.relu(norm(x) @ w[f"{p}ffn.up_proj.weight"].T).square() @ w[f"{p}ffn.down_proj.weight"].T
        if i == c.depth // 2:
            middle = x
    logits = norm(x - w["backout.scale"] * middle) @ w["lm_head.weight"][: c.vocab_size].T
    return c.softcap * torch.tanh(logits / c.softcap)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward_equals_the_formulas(seed: int) -> None:
    model = tiny(seed)
    tokens = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([written_again(model, row) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=2e-5)


def test_packed_documents_equal_separate_ones() -> None:
    model = tiny()
    tokens = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(13), torch.arange(7)))[None]
    doc_ids = torch.tensor([[0] * 13 + [1] * 7])
    packed = model(tokens, positions, doc_ids)
    separate = torch.cat((model(tokens[:, :13]), model(tokens[:, 13:])), dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny()
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    model(tokens).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("part", ["smear", "value_embeddings", "residual_lambdas", "backout"])
def test_each_part_can_be_switched_off(part: str) -> None:
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(1))
    off = tiny(**{part: False})
    assert off(tokens).isfinite().all()
    assert sum(p.numel() for p in off.parameters()) < sum(p.numel() for p in tiny().parameters())


def test_initial_weights() -> None:
    model = Nanochat(NanochatConfig(vocab_size=512, depth=4, head_dim=64))
    found = {}
    for name, parameter in model.named_parameters():
        full = torch.full(parameter.shape, math.nan)
        model.init_parameter(name, full, torch.Generator().manual_seed(1))
        assert full.isfinite().all(), name
        found[name] = full
    assert found["layers.0.mixer.q_proj.weight"].std() == pytest.approx(256**-0.5, rel=0.02)
    assert found["layers.0.ffn.up_proj.weight"].std() == pytest.approx(0.4 * 256**-0.5, rel=0.02)
    assert (
        found["layers.2.mixer.o_proj.weight"].abs().max()
        == found["layers.2.ffn.down_proj.weight"].abs().max()
        == 0
    )
    assert found["embed_tokens.weight"].std() == pytest.approx(0.8, rel=0.02)
    assert found["lm_head.weight"].std() == pytest.approx(0.001, rel=0.02)
    blends = [
        [found[f"layers.{i}.blend.{part}"].item() for i in range(4)] for part in ("stream", "embedding")
    ]
    assert blends[0] == pytest.approx([1.15, 1.1167, 1.0833, 1.05], abs=1e-4)
    assert blends[1] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert found["backout.scale"].item() == pytest.approx(0.2)
    assert found["smear.scale"].item() == 0


def test_impossible_sizes_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        NanochatConfig(depth=0, window_pattern="SX").validate()
    assert error.value.mistakes == [
        "depth = 0: wants a number above 0",
        "window_pattern = 'SX': wants letters S (short) and L (long)",
    ]
    with pytest.raises(ConfigError, match=r"smear_channels = 24: wants 1 to hidden_size = 8"):
        NanochatConfig(depth=1, aspect_ratio=8, head_dim=8).validate()
