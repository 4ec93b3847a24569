"""nanochat against the published sizes and against a second writing of its forward pass, straight from the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nanovl.errors import ConfigError
from nanovl.models.blocks.mtp import MtpConfig, with_ahead
from nanovl.models.nanochat import Nanochat, NanochatConfig
from nanovl.models.nanochat_v1 import FAMILY as V1
from nanovl.spec import Batch, run_batch

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


class WrittenAgain:
    """The forward pass for one document, token by token where that is the definition."""

    def __init__(self, model: Nanochat) -> None:
        self.c, self.w = model.config, dict(model.named_parameters())

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.c.norm_eps)

    def embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        c, w = self.c, self.w
        x = self.norm(w["embed_tokens.weight"][tokens])
        gate = w["smear.scale"] * torch.sigmoid(x[:, : c.smear_channels] @ w["smear.gate.weight"].T)
        return torch.stack([x[t] + (gate[t] * x[t - 1] if t else 0) for t in range(len(tokens))])

    def turn(self, z: torch.Tensor) -> torch.Tensor:
        dim = self.c.head_dim
        frequency = self.c.rope_theta ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.arange(len(z))[:, None] * frequency
        a, b, cos, sin = z[..., : dim // 2], z[..., dim // 2 :], angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def block(
        self, p: str, x: torch.Tensor, x0: torch.Tensor, tokens: torch.Tensor, *, short: bool, ve: bool
    ) -> torch.Tensor:
        c, w, norm = self.c, self.w, self.norm
        length, heads, dim = len(tokens), c.num_attention_heads, c.head_dim
        x = w[f"{p}blend.stream"] * x + w[f"{p}blend.embedding"] * x0
        h = norm(x)
        q, k, v = ((h @ w[f"{p}mixer.{n}_proj.weight"].T).view(length, heads, dim) for n in "qkv")
        if ve:
            g = c.value_gate_scale * torch.sigmoid(
                h[:, : c.value_gate_channels] @ w[f"{p}mixer.value_gate.weight"].T
            )
            v = v + g[..., None] * w[f"{p}mixer.value_embed.weight"][tokens].view(length, heads, dim)
        q, k = norm(self.turn(q)) * c.qk_scale, norm(self.turn(k)) * c.qk_scale
        out = []
        window = 4 if short else 10**9  # ceil to 4 of 16 / 4
        for t in range(length):
            first = max(0, t - window)
            scores = torch.einsum("hd,shd->hs", q[t], k[first : t + 1]) / math.sqrt(dim)
            out.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[first : t + 1]))
        x = x + torch.stack(out).flatten(1) @ w[f"{p}mixer.o_proj.weight"].T
        return x + F.relu(norm(x) @ w[f"{p}ffn.up_proj.weight"].T).square() @ w[f"{p}ffn.down_proj.weight"].T

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Before the last norm."""
        x0 = self.embedding(tokens)
        x, middle, last = x0, x0, self.c.depth - 1
        for i in range(self.c.depth):
            short = i % 4 != 3 and i != last
            x = self.block(f"layers.{i}.", x, x0, tokens, short=short, ve=i % 2 == last % 2)
            if i == self.c.depth // 2:
                middle = x
        return x - self.w["backout.scale"] * middle

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.norm(states) @ self.w["lm_head.weight"][: self.c.vocab_size].T
        return self.c.softcap * torch.tanh(logits / self.c.softcap)

    def logits_ahead(self, tokens: torch.Tensor, depths: int, **kind: bool) -> list[torch.Tensor]:
        """Of each depth k, at the places that have a token k further on."""
        found, x = [], self.states(tokens)
        for k in range(1, depths + 1):
            p, later = f"mtp.{self.c.depth + k - 1}.", tokens[k:]
            x0, hidden = self.embedding(later), x[:-1]
            if self.c.mtp.hidden == "post_norm":
                hidden = self.norm(hidden)
            both = torch.cat((self.norm(x0), self.norm(hidden)), -1)
            x = self.block(f"{p}block.", both @ self.w[f"{p}eh_proj.weight"].T, x0, later, **kind)
            found.append(self.logits(x))
        return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward_equals_the_formulas(seed: int) -> None:
    model = tiny(seed)
    tokens = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(seed))
    again = WrittenAgain(model)
    expected = torch.stack([again.logits(again.states(row)) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=2e-5)


def test_packed_documents_equal_separate_ones() -> None:
    model = tiny()
    tokens = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(13), torch.arange(7)))[None]
    doc_ids = torch.tensor([[0] * 13 + [1] * 7])
    packed = model(tokens, positions, doc_ids)
    separate = torch.cat((model(tokens[:, :13]), model(tokens[:, 13:])), dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


def packed() -> Batch:
    """Documents of 13 and 7 tokens."""
    tokens = torch.randint(0, 61, (1, 21), generator=torch.Generator().manual_seed(1))
    return {
        "tokens_BT": tokens[:, :-1],
        "targets_BT": tokens[:, 1:],
        "positions_BT": torch.cat((torch.arange(13), torch.arange(7)))[None],
        "doc_ids_BT": torch.tensor([[0] * 13 + [1] * 7]),
        "weights_BT": torch.ones(1, 20),
    }


def logits_of_depths(model: Nanochat) -> list[torch.Tensor]:
    """Next-token logits of the packed documents and those of each depth, [V] for every place with a target."""
    batch = with_ahead(packed(), model.mtp_layers)
    every: list[torch.Tensor] = run_batch(model, batch, lambda head, x, _, *more: [head(x), *map(head, more)])
    there = [batch["targets_BT"] >= 0, *(batch["ahead_targets_BTU"] >= 0).unbind(-1)]
    return [logits[places] for logits, places in zip(every, there, strict=True)]


KINDS = {
    "none": {"short": False, "ve": True},  # as the last layer
    "short": {"short": True, "ve": False},
    "long": {"short": False, "ve": False},
    "short_ve": {"short": True, "ve": True},
}


@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("block", list(KINDS))
def test_tokens_ahead_are_predicted_by_the_formulas(hidden: Any, block: str) -> None:
    mtp = MtpConfig(num_layers=2, hidden=hidden, block=None if block == "none" else block)
    model = tiny(mtp=mtp)
    found = logits_of_depths(model)
    again, tokens = WrittenAgain(model), packed()["tokens_BT"][0]
    documents = [again.logits_ahead(part, 2, **KINDS[block]) for part in (tokens[:13], tokens[13:])]
    for k in (1, 2):
        expected = torch.cat([depths[k - 1] for depths in documents])
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=2e-5)


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny(mtp=MtpConfig(num_layers=2))
    torch.stack([logits.square().sum() for logits in logits_of_depths(model)]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("part", ["smear", "value_embeddings", "residual_lambdas", "backout"])
def test_each_part_can_be_switched_off(part: str) -> None:
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(1))
    mtp = MtpConfig(num_layers=2)
    off = tiny(**{part: False}, mtp=mtp)
    assert off(tokens).isfinite().all()
    assert all(logits.isfinite().all() for logits in logits_of_depths(off))
    assert sum(p.numel() for p in off.parameters()) < sum(p.numel() for p in tiny(mtp=mtp).parameters())


@pytest.mark.parametrize("smear", [True, False])
def test_flops_of_depths_equal_those_torch_counts(smear: bool) -> None:
    model = tiny(mtp=MtpConfig(num_layers=2), smear=smear, window_pattern="L", max_position_embeddings=64)
    batch = packed() | {"doc_ids_BT": torch.zeros(1, 20, dtype=torch.int64)}

    def objective(head: Any, x: torch.Tensor, _: Batch, *ahead: torch.Tensor) -> torch.Tensor:
        return torch.stack([head(states).sum() for states in (x, *ahead)])

    with FlopCounterMode(display=False) as counter:
        run_batch(model, with_ahead(batch, 2), objective)

    def flops(keys: int) -> float:
        return model.forward_flops_per_token(lambda window: keys)

    assert counter.get_total_flops() == 20 * flops(0)  # it does not see a CPU's attention
    assert flops(20) - flops(0) == 7 * 4 * 20 * 40  # layers and modules, scores and values, keys, channels


def test_initial_weights() -> None:
    mtp = MtpConfig(num_layers=2)
    model = Nanochat(NanochatConfig(vocab_size=512, depth=4, head_dim=64, mtp=mtp))
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
    # modules begin like the last layer, with states of size 1
    for k in (4, 5):
        blend = [found[f"mtp.{k}.block.blend.{part}"].item() for part in ("stream", "embedding")]
        assert blend == pytest.approx([1.05, 0.05])
        assert found[f"mtp.{k}.block.mixer.o_proj.weight"].abs().max() == 0
        assert found[f"mtp.{k}.eh_proj.weight"].std() == pytest.approx(512**-0.5, rel=0.02)


def test_impossible_sizes_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        NanochatConfig(depth=0, window_pattern="SX").validate()
    assert error.value.mistakes == [
        "depth = 0: wants a number above 0",
        "window_pattern = 'SX': wants letters S (short) and L (long)",
    ]
    with pytest.raises(ConfigError, match=r"smear_channels = 24: wants 1 to hidden_size = 8"):
        NanochatConfig(depth=1, aspect_ratio=8, head_dim=8).validate()
    with pytest.raises(ConfigError) as error:
        NanochatConfig(depth=4, mtp=MtpConfig(num_layers=0, loss_weight=0, block="full")).validate()
    assert error.value.mistakes == [
        "mtp.num_layers = 0: wants 1 or more; set mtp to none to predict one token alone",
        "mtp.loss_weight = 0: wants a number above 0; set mtp to none to train without",
        "mtp.block = 'full': is no block; choose from short, short_ve, long_ve",
    ]
