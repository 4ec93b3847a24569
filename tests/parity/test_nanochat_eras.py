"""Every era of nanochat against an independent writing of its model, and the first one against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from nanochat_reference import ERAS, imported, random_tokens, reference, write, write_tokenizer
from torch import nn

from nanovl.checkpoint.key_map import KeyMap
from nanovl.conversion.convert import convert
from nanovl.inference.engine import Engine
from nanovl.models.nanochat_config import EPS, NanochatConfig
from nanovl.models.nanochat_config import ERAS as OURS
from nanovl.optim.groups import assign
from nanovl.registry import family

DAYS = list(ERAS)
LAST = "2026-03-14"
SECOND = {"2026-01-18": {"softcap": 15}, "2026-03-02": {"softcap": 20}}
"""What has to be added to a meta file."""


def flavor_of(day: str) -> NanochatConfig:
    return family("nanochat").flavors["d12" if day == LAST else f"d12@{day}"]()


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("day", DAYS)
def test_logits_and_gradients_of_every_era(tmp_path: Path, day: str, kv_heads: int) -> None:
    theirs = reference(day, n_kv_head=kv_heads)
    ours, spec = imported(write(tmp_path, theirs, **SECOND.get(day, {})))
    assert spec.family.name == ("nanochat_v1" if day == "2025-10-13" else "nanochat")
    tokens = random_tokens(300)  # windows of 128, 200 and 256 earlier tokens
    expected, actual = theirs(tokens), ours(tokens)
    assert (expected - actual).abs().max() <= 2e-5
    for model, logits in ((theirs, expected), (ours, actual)):
        model.zero_grad()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    names = KeyMap(spec.family.nanochat.key_rules(spec.config))  # type: ignore[union-attr]
    mine = dict(ours.named_parameters())
    seen = set()
    for name in theirs.state_dict():
        group = names.group(theirs=name)
        assert group is not None, name
        found, wanted = (
            group.to_theirs([mine[n].grad for n in group.ours])[0],
            theirs.get_parameter(name).grad,
        )
        pad = nn.functional.pad(found, (0, 0, 0, len(wanted) - len(found))) if found.dim() == 2 else found
        assert (pad - wanted).norm() <= 1e-4 * wanted.norm(), name
        seen |= {*group.ours}
    assert seen == mine.keys()


@pytest.mark.parametrize("day", DAYS)
def test_greedy_tokens_of_every_era(tmp_path: Path, day: str) -> None:
    theirs = reference(day)
    ours, _ = imported(write(tmp_path, theirs, **SECOND.get(day, {})))
    text = random_tokens(118, seed=3)[:1]
    for _ in range(20):
        text = torch.cat((text, theirs(text)[:, -1:].argmax(-1)), dim=1)
    assert Engine(ours).generate([text[0, :118].tolist()], max_tokens=20)[0].ids == text[0, 118:].tolist()


def test_every_era_is_a_flavor_with_its_fields(tmp_path: Path) -> None:
    assert [*OURS] == DAYS[1:]
    for day in DAYS[1:]:
        _, spec = imported(write(tmp_path / day, reference(day, vocab=192), **SECOND.get(day, {})))
        flavor = flavor_of(day)
        sizes = (
            "vocab_size",
            "depth",
            "aspect_ratio",
            "head_dim",
            "max_position_embeddings",
            "window_pattern",
        )
        differing = {key for key, value in vars(spec.config).items() if value != getattr(flavor, key)}
        assert differing <= set(sizes)


def test_sizes_of_a_released_checkpoint_are_those_of_its_flavor(tmp_path: Path) -> None:
    meta = {"sequence_len": 2048, "n_layer": 12, "n_head": 6, "n_kv_head": 6, "n_embd": 768}
    shapes = {"resid_lambdas": (12,), "smear_gate.weight": (1, 24), "transformer.wte.weight": (32768, 768)}
    nanochat, v1 = family("nanochat"), family("nanochat_v1")
    files = {"model_config": {**meta, "vocab_size": 32768, "window_pattern": "SSSL"}}
    assert nanochat.nanochat is not None
    assert nanochat.nanochat.config_from_meta(files, shapes) == nanochat.flavors["d12"]()
    d20 = {**meta, "vocab_size": 65536, "n_layer": 20, "n_head": 10, "n_kv_head": 10, "n_embd": 1280}
    assert v1.nanochat is not None
    assert v1.nanochat.config_from_meta({"model_config": d20}, {}) == v1.flavors["d20"]()
    assert v1.nanochat.config_to_meta is not None
    assert v1.nanochat.config_to_meta(v1.flavors["d20"]()) == d20


def test_first_release_goes_through_transformers_and_back(tmp_path: Path) -> None:
    theirs = reference("2025-10-13", vocab=267)
    write(tmp_path / "pt", theirs)
    write_tokenizer(tmp_path / "pt")
    convert(tmp_path / "pt", tmp_path / "hf", to="hf", dtype="float32")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(hf) is transformers.NanoChatForCausalLM
    assert hf.config.rms_norm_eps == pytest.approx(EPS)
    # nanochat's own rows of queries and keys, not ours with their halves swapped
    c_q = theirs.get_parameter("transformer.h.0.attn.c_q.weight")
    assert torch.equal(hf.get_parameter("model.layers.0.self_attn.q_proj.weight"), c_q)
    tokens = random_tokens(60)
    assert (hf(tokens).logits - theirs(tokens)).abs().max() <= 2e-5
    convert(tmp_path / "hf", tmp_path / "again", to="nanochat")
    before, after = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("pt/model_000012.pt", "again/model_000012.pt")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(value[: len(after[name])], after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("flavor", "total"),
    [
        # 2 x 32768 x 768 tables, 12 x 12 x 768^2 matrices, 24 lambdas
        ("d12@2026-01-11", 2 * 32768 * 768 + 144 * 768**2 + 24),
        # the log of nanochat, 27 January: 412,091,556 less its table of pairs and that one's 12 lambdas
        ("d12@2026-01-18", 412_091_556 - 125_829_120 - 12),
        ("d26@2026-01-18", 1_681_790_292),  # as published
        ("d26@2026-03-02", 1_681_790_292),
        ("d26@2026-03-09", 1_681_786_938 - 26),  # without smear and backout
        ("d26", 1_681_786_938),
        ("d24", 1_384_122_122),
    ],
)
def test_sizes_of_every_era(flavor: str, total: int) -> None:
    found = family("nanochat")
    with torch.device("meta"):
        model = found.model(found.flavors[flavor]())
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("day", DAYS[1:])
def test_every_era_can_be_trained(day: str) -> None:
    """Its weights begin as finite numbers, and each of them belongs to one optimizer group."""
    found = family("nanochat")
    config = flavor_of(day)
    config.depth, config.head_dim, config.vocab_size = 4, 64, 64
    model = found.model(config)
    assign(model.named_parameters(), found.optimizer_groups(config))
    begun = {}
    for name, parameter in model.named_parameters():
        full = torch.full(parameter.shape, torch.nan)
        model.init_parameter(name, full, torch.Generator().manual_seed(1))
        assert full.isfinite().all(), name
        begun[name] = full
    lambdas = [[begun[f"layers.{i}.blend.{part}"].item() for i in (0, 3)] for part in ("stream", "embedding")]
    streams = [1.15, 1.05] if day == LAST else [1.0, 1.0]
    embeddings = {"2026-01-11": [0.0, 0.0], LAST: [0.2, 0.05]}.get(day, [0.1, 0.1])
    assert lambdas == [pytest.approx(streams), pytest.approx(embeddings)]
