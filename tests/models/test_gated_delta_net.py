from __future__ import annotations

from math import exp, inf, log, sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.config.schema import Job, Model
from nanovl.errors import ConfigError
from nanovl.inference.cache import Feed, KVCache
from nanovl.models.blocks.attention import AttentionMeta
from nanovl.models.blocks.delta_rule import chunked, decay_between, recurrent
from nanovl.models.blocks.gated_delta_net import (
    GatedDeltaNet,
    GatedDeltaNetConfig,
    causal_convolution,
)
from nanovl.models.blocks.norm import NormConfig
from nanovl.optim.groups import assign
from nanovl.parallelisms.init import init_weights
from nanovl.registry import family, resolve_model, spec_from_dict, spec_to_dict
from nanovl.shrink import shrink

COUNTS = {
    ("qwen3_next", "80b-a3b"): 79_674_391_296,
    ("qwen3_5", "27b"): 26_895_998_464,
    ("qwen3_5_moe", "35b-a3b"): 34_660_610_688,
}
"""Parameters of the same sizes built by transformers; see tests/parity/test_gdn_families_hf.py."""
NAMES = [name for name, _ in COUNTS]
CPU = torch.device("cpu")


def drawn(tokens: int, starts: tuple[int, ...] = (0,), fastest: float = 1.0, rows: int = 2) -> list[Tensor]:
    """q, k, v, g, beta of 3 heads with 8 key and 6 value channels; documents begin at `starts`."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, tokens, 3, *shape, generator=generator)

    k = F.normalize(normal(8), dim=-1)
    g = -fastest * normal().square() * normal().square()
    g[:, list(starts)] = -inf
    return [x.requires_grad_() for x in (normal(8), k, normal(6), g, normal().sigmoid())]


def test_the_rule_by_hand() -> None:
    # one head of one channel: it recalls 0, then e^-1 S = 3, and corrects half of the error
    one = torch.ones(1, 1, 1)
    out, state = recurrent(one[None], one[None], 6 * one[None], -inf * one, one / 2)
    assert out.item() == state.item() == 3.0
    g = -log(2) * one
    out, state = recurrent(2 * one[None], one[None], 6 * one[None], g, one / 2, state)
    assert state.item() == pytest.approx(1.5 + (6 - 1.5) / 2)
    assert out.item() == pytest.approx(2 * state.item())
    for rule in (recurrent, chunked):
        q, k, v = (torch.tensor(x).view(1, -1, 1, 1) for x in ([1.0, 2.0], [1.0, 1.0], [6.0, 6.0]))
        g, beta = torch.tensor([-inf, -log(2)]).view(1, 2, 1), torch.full((1, 2, 1), 0.5)
        assert rule(q, k, v, g, beta)[0].flatten().tolist() == pytest.approx([3.0, 7.5])


def test_decays_between_tokens_by_hand() -> None:
    g = torch.tensor([-1.0, -2.0, -inf, -4.0])
    assert decay_between(g).tolist() == [
        pytest.approx(row) for row in ([1, 0, 0, 0], [exp(-2), 1, 0, 0], [0, 0, 1, 0], [0, 0, exp(-4), 1])
    ]


@pytest.mark.parametrize(
    ("tokens", "starts", "fastest"),
    [
        (1, (0,), 1.0),
        (7, (0, 3), 1.0),
        (64, (0,), 0.01),
        (130, (0, 5, 64, 70, 71), 1.0),
        (200, (0, 127, 128), 20.0),
    ],
)
def test_chunks_equal_the_definition(tokens: int, starts: tuple[int, ...], fastest: float) -> None:
    given = drawn(tokens, starts, fastest)
    (expected, last), (actual, last_too) = recurrent(*given), chunked(*given)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(last_too, last, rtol=0, atol=5e-6)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted, found = (torch.autograd.grad((x * weight).sum(), given) for x in (expected, actual))
    for a, b in zip(found, wanted, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= 2e-6 * b.norm() + 1e-9


def test_a_row_in_parts_is_the_row() -> None:
    given = [x.detach() for x in drawn(150, (0, 90))]
    whole, last = chunked(*given)
    parts, state = [], None
    for part in zip(*(x.split([70, 1, 9, 70], dim=1) for x in given), strict=True):
        out, state = (recurrent if part[0].shape[1] == 1 else chunked)(*part, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=5e-6)
    torch.testing.assert_close(state, last, rtol=0, atol=5e-6)


def test_the_convolution_is_torchs_and_stops_at_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, 5, generator=generator), torch.randn(5, 4, generator=generator)

    def convolved(x: Tensor, positions: Tensor) -> Tensor:
        return causal_convolution(F.pad(x, (0, 0, 3, 0)), weight, positions.expand(len(x), -1))

    expected = F.conv1d(x.mT, weight[:, None], padding=3, groups=5)[..., :9].mT
    torch.testing.assert_close(convolved(x, torch.arange(9)), expected)
    lengths = [4, 1, 2, 2]
    packed = convolved(x, torch.cat([torch.arange(n) for n in lengths]))
    separate = [convolved(part, torch.arange(part.shape[1])) for part in x.split(lengths, dim=1)]
    assert torch.equal(packed, torch.cat(separate, dim=1))


def layer(**change: Any) -> GatedDeltaNet:
    sizes = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 6, **change}
    made = GatedDeltaNet(GatedDeltaNetConfig(**sizes), 16, NormConfig())
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def meta(positions: Tensor) -> AttentionMeta:
    return AttentionMeta(positions, {}, {})


@pytest.mark.parametrize("change", [{}, {"num_key_heads": 4}, {"conv_kernel_size": 1}])
def test_documents_do_not_know_of_each_other(change: dict[str, int]) -> None:
    mixer = layer(**change)
    lengths = [70, 1, 2, 60]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    x = torch.randn(1, 133, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = mixer(x, meta(positions))
    other = x.detach().clone()
    other[:, :71] = 9.0
    assert torch.equal(mixer(other, meta(positions))[:, 71:], out[:, 71:])  # bit for bit
    separate = [mixer(p, meta(torch.arange(p.shape[1])[None])) for p in x.split(lengths, dim=1)]
    torch.testing.assert_close(out, torch.cat(separate, dim=1), rtol=1e-4, atol=2e-6)
    (gradient,) = torch.autograd.grad(out[:, 73:].sum(), x)
    assert not gradient[:, :73].any()
    assert gradient[:, 73:].any(dim=-1).all()


def test_bfloat16_is_near() -> None:
    mixer, positions = layer(), torch.arange(100)[None]
    x = torch.randn(1, 100, 16, generator=torch.Generator().manual_seed(1))
    expected = mixer(x, meta(positions))
    actual = mixer.bfloat16()(x.bfloat16(), meta(positions))
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_slots_keep_their_states_through_padding_and_chunks() -> None:
    model = family("qwen3_5").model(family("qwen3_5").flavors["debug"]())
    init_weights(model, 0)
    cache = KVCache(model)
    cache.reserve(3, 100)
    tokens = torch.randint(0, 512, (2, 90), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)

    def run(slots: list[int], starts: list[int], counts: list[int]) -> Tensor:
        feed = Feed(slots, starts, counts, CPU)
        fed = torch.zeros(len(slots), max(counts), dtype=torch.long)
        for b, (slot, start, count) in enumerate(zip(slots, starts, counts, strict=True)):
            fed[b, :count] = tokens[slot // 2, start : start + count]
        with cache.installed(feed):
            return model(fed, feed.positions_BT)[feed.last]

    steps = [
        ([0, 2], [0, 0], [1, 70]),  # the first row's padding repeats position 0
        ([0, 2], [1, 70], [40, 2]),
        ([0], [41], [1]),
        ([0, 2], [42, 72], [1, 1]),
        ([0, 2], [43, 73], [47, 17]),
    ]
    for slots, starts, counts in steps:
        for slot, start, count, found in zip(slots, starts, counts, run(slots, starts, counts), strict=True):
            torch.testing.assert_close(found, whole[slot // 2, start + count - 1], rtol=0, atol=2e-5)
    cache.clear(0)
    assert all(not store[0].any() and store[2].any() for *_, c in cache._seats for store in c.stores())
    # 3 layers x (3 earlier tokens x (2 x 32 + 96) channels + 6 matrices of 16 x 16), 4 bytes
    assert cache.memory().bytes_per_slot == 3 * (3 * 160 + 6 * 256) * 4
    assert cache.memory().bytes == sum(s.nbytes for *_, c in cache._seats for s in c.stores())
    assert str(cache.memory()).endswith("3 slots x (128 tokens x 512 bytes + 24,192 bytes)")


@pytest.mark.parametrize("name", NAMES)
def test_flavors_have_the_published_parameters(name: str) -> None:
    found = family(name)
    assert [*found.flavors] == [flavor for n, flavor in COUNTS if n == name] + ["debug"]
    for flavor, make in found.flavors.items():
        config = make()
        config.validate()
        assert [n[0] for n in config.layer_names()] == [*"lllf"] * (config.num_hidden_layers // 4)
        if flavor != "debug":
            with torch.device("meta"):
                model = found.model(config)
            assert sum(p.numel() for p in model.parameters()) == COUNTS[name, flavor]


@pytest.mark.parametrize("name", NAMES)
def test_weights_begin_as_in_transformers(name: str) -> None:
    model = family(name).model(family(name).flavors["debug"]())
    init_weights(model, 3)
    found = dict(model.named_parameters())
    decays = torch.cat([p for key, p in found.items() if key.endswith("A_log")]).exp()
    assert 0.01 <= decays.min() < 5
    assert 10 < decays.max() <= 16
    for key, parameter in found.items():
        if key.endswith(("dt_bias", "gated_norm.weight")):
            assert (parameter == 1).all(), key
        elif "norm" in key:
            assert (parameter == 0).all(), key
        elif not key.endswith("A_log"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.35), key


def test_only_matrices_decay() -> None:
    found = family("qwen3_next")
    config = found.flavors["debug"]()
    with torch.device("meta"):
        model = found.model(config)
    decayed, others = assign(model.named_parameters(), found.optimizer_groups(config))
    assert (decayed.config.weight_decay, others.config.weight_decay) == (None, 0.0)  # None = the job's
    inputs = [f"layers.0.mixer.{name}_proj.weight" for name in "qkvzabo"]
    assert inputs == [name for name, _ in decayed.parameters if name.startswith("layers.0.mixer.")]
    kept = {
        name.removeprefix("layers.0.mixer.") for name, _ in others.parameters if "layers.0.mixer." in name
    }
    assert kept == {"q_conv", "k_conv", "v_conv", "A_log", "dt_bias", "gated_norm.weight"}


def test_mistakes_are_said_together() -> None:
    with pytest.raises(ConfigError) as error:
        resolve_model(
            Model(
                name="qwen3_5",
                flavor="debug",
                overrides={
                    "blocks": {
                        "linear": {"mixer": {"num_value_heads": 3}},
                        "full": {"mixer": {"head_dim": 7}},
                    }
                },
            ),
            512,
        )
    assert "model.blocks.linear.mixer.num_value_heads = 3: wants a multiple of num_key_heads = 2" in str(
        error.value
    )
    assert "model.blocks.full.mixer.head_dim = 7" in str(error.value)


def test_any_layer_may_be_of_any_kind() -> None:
    sizes = {"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 8, "value_head_dim": 8}
    linear = {"mixer": {"kind": "gated_delta_net", **sizes}}
    spec = resolve_model(Model(name="qwen3", flavor="debug", overrides={"blocks": {"full": linear}}), 64)
    assert spec_from_dict(spec_to_dict(spec)) == spec
    model = spec.family.model(spec.config)
    init_weights(model, 0)
    assert model(torch.arange(5)[None]).isfinite().all()
    assert spec.family.hf is not None
    with pytest.raises(ConfigError, match="is not made of attention and MLPs"):
        spec.family.hf.config_to_hf(spec.config)
    with pytest.raises(ConfigError, match=r"kind.*wants a table with a `kind` that is 'attention' or"):
        resolve_model(
            Model(name="qwen3", flavor="debug", overrides={"blocks": {"full": {"mixer": {"kind": "rnn"}}}}),
            64,
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("block", "part", "change", "message"),
    [
        ("full", "mixer", {"output_gate": False}, "output_gate = False: .* has True there"),
        ("full", "ffn", {"activation": "relu2"}, r"model\.blocks\.full\.ffn"),
        ("linear", "mixer", None, "wants `linear`, of gated_delta_net, and `full`, of attention"),
    ],
)
def test_what_transformers_cannot_say_is_refused(
    name: str, block: str, part: str, change: dict[str, Any] | None, message: str
) -> None:
    found = family(name)
    config = found.flavors["debug"]()
    assert found.hf is not None
    assert found.config_from_hf(found.hf.config_to_hf(config)) == config
    if change is None:
        config.blocks[block].mixer = config.blocks["full"].mixer
    else:
        for key, value in change.items():
            setattr(getattr(config.blocks[block], part), key, value)
    with pytest.raises(ConfigError, match=message):
        found.hf.config_to_hf(config)


def test_what_is_not_computed_here_is_refused() -> None:
    found = family("qwen3_next")
    assert found.hf is not None
    said = found.hf.config_to_hf(found.flavors["debug"]())
    with pytest.raises(ConfigError, match=r"mlp_only_layers = \[1\]: qwen3_next here computes \[\] alone"):
        found.config_from_hf({**said, "mlp_only_layers": [1]})
    with pytest.raises(ConfigError, match="sliding_attention is none of linear_attention, full_attention"):
        found.config_from_hf({**said, "layer_types": ["sliding_attention"] * 4})
    silent = {key: value for key, value in said.items() if key != "layer_types"}
    assert found.config_from_hf({**silent, "full_attention_interval": 2}).pattern == ["linear", "full"]


@pytest.mark.parametrize("name", NAMES)
def test_shrunk_released_sizes_still_build(name: str) -> None:
    flavor = next(iter(family(name).flavors))
    vocab = family(name).flavors[flavor]().vocab_size
    job = Job(model=Model(name=name, flavor=flavor))
    job.tokenizer.vocab_size = vocab
    small = shrink(job, resolve_model(job.model, vocab).config, 1)
    config = resolve_model(small.model, small.tokenizer.vocab_size).config
    mixer = config.blocks["linear"].mixer
    assert (mixer.num_key_heads, mixer.num_value_heads) == (2, 4)
    assert (mixer.key_head_dim, mixer.value_head_dim) == (16, 16)
    model = family(name).model(config)
    assert sum(p.numel() for p in model.parameters()) < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layers_compile_into_whole_graphs(name: str) -> None:
    model = family(name).model(family(name).flavors["debug"]())
    init_weights(model, 0)
    tokens = torch.randint(0, 512, (2, 100))
    expected = model(tokens)
    for block in model.blocks():
        block.mixer.compile(fullgraph=True, backend="aot_eager")  # type: ignore[union-attr, operator]
    actual = model(tokens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    actual.sum().backward()
    assert sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)) > 0
