"""DeepSeek-V3.2 as it is trained: the indexer first, alone, then everything; and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanovl.config.schema import Model
from nanovl.errors import ConfigError
from nanovl.flops import causal_keys, training_flops_per_token
from nanovl.inference.engine import Engine
from nanovl.inference.load import load
from nanovl.metrics import read_metrics
from nanovl.models.blocks.mla import LatentAttention
from nanovl.registry import family, read_job, resolve_model
from nanovl.trainer import train

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
FROZEN = r"""
[[optimizer.groups]]
match = 'layers\.\d+\.mixer\.indexer\..*'
lr = 1e-2
[[optimizer.groups]]
match = '.*'
lr = 0.0
weight_decay = 0.0
"""


def index_loss(kind: str) -> list[str]:
    return [f"--model.blocks.{name}.mixer.indexer.index_loss={kind}" for name in ("dense", "moe")]


def run(
    folder: Path,
    flags: list[str],
    *files: Path,
    name: str = "deepseek_v32",
    begin: str = "",
    grow: bool = False,
) -> list[float]:
    """Mean loss of the indexers at each step, if there are any; `begin` = the run beside this one to start from."""
    flags = [*flags, f"--job.run_dir={folder}", f"--model.name={name}"]
    if begin:
        path = f"--checkpoint.initial_load_path={folder.parent / begin}"
        flags += [path, f"--checkpoint.initial_load_grow={str(grow).lower()}"]
    train(read_job([CONFIG, *files], flags))
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]
    return [r["indexer/kl"] for r in records if "indexer/kl" in r]


def test_warm_up_teaches_the_indexer_alone_then_all_learn(tmp_path: Path, tiny_flags: list[str]) -> None:
    (tmp_path / "frozen.toml").write_text(FROZEN)
    flags = [*tiny_flags, "--model.init.std=0.2", "--lr_schedule.kind=constant", "--training.steps=2"]
    assert run(tmp_path / "v3", flags, name="deepseek_v3") == []

    held = [*flags, "--model.blocks.moe.ffn.bias_update_speed=0", "--training.steps=16", *index_loss("dense")]
    with pytest.raises(ConfigError, match=r"dense\.mixer\.indexer\.index_head_dim = 16: it has None"):
        run(tmp_path / "refused", held, begin="v3")
    losses = run(tmp_path / "warm", held, tmp_path / "frozen.toml", begin="v3", grow=True)
    assert losses[-1] < 0.6 * losses[0], losses
    before, warm = (load(tmp_path / name, device="cpu").model.state_dict() for name in ("v3", "warm"))
    assert {name for name in warm if name not in before} == {name for name in warm if "indexer" in name}
    assert all(torch.equal(warm[name], weight) for name, weight in before.items())

    with pytest.raises(ConfigError, match=r"initial_load_grow = true: .* has every part of the model"):
        run(tmp_path / "refused too", flags, begin="warm", grow=True)
    more = run(tmp_path / "all", [*flags, *index_loss("sparse")], begin="warm")
    assert all(loss < losses[0] for loss in more)
    moved = load(tmp_path / "all", device="cpu")
    assert all(not torch.equal(p, warm[name]) for name, p in moved.model.named_parameters())
    assert len(Engine(moved).generate([list(range(1, 30))], max_tokens=2)[0].ids) == 2


def test_growing_wants_weights_to_begin_with(tiny_flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"initial_load_grow = true: .* set checkpoint.initial_load_path"):
        read_job([CONFIG], [*tiny_flags, "--checkpoint.initial_load_grow=true"])


def model(kind: str, flavor: str = "671b-a37b") -> Any:
    indexed = {"mixer": {"indexer": {"index_loss": kind}}}
    overrides = {"blocks": {"dense": indexed, "moe": indexed}}
    spec = resolve_model(Model(name="deepseek_v32", flavor=flavor, overrides=overrides), None)
    with torch.device("meta"):
        return spec.family.model(spec.config)


@pytest.mark.parametrize(
    ("kind", "billions"),
    [
        # 6 N 219.7, attention 6 * 128 * 320 * 61 * 2032.5, indexer forward 67.7: 2 * 13.96M * 61 in projections and
        # 2 * 8256 * 61 for each of 65536.5 keys
        ("none", 219.7 + 30.5 + 67.7),
        # and backward: projections once more, and 4 * 8256 * 61 for each of 2032.5 keys
        ("sparse", 317.9 + 1.7 + 4.1),
        # or of all 65536.5, which attention sees too
        ("dense", 219.7 + 982.5 + 67.7 + 1.7 + 132.0),
    ],
)
def test_flops_of_the_released_size(kind: str, billions: float) -> None:
    found = training_flops_per_token(model(kind), causal_keys(131072)) / 1e9
    assert found == pytest.approx(billions, abs=0.15)


def test_the_indexer_costs_what_torch_counts_of_its_formula() -> None:
    """Scores with a gradient, all at once: three products of each size, and two of projections of fixed inputs."""
    layer: LatentAttention = model("dense", "debug").to_empty(device="cpu").layers["0"].mixer
    indexer, tokens = layer.indexer, 20
    assert indexer is not None
    x, latent = torch.randn(1, tokens, 64), torch.randn(1, tokens, 24)
    half = torch.zeros(1, tokens, 1, 4)
    with FlopCounterMode(display=False) as counter:
        index = indexer(x, latent, half, half)
        dots = torch.bmm(index.q_BTID.flatten(1, 2), index.k_BSD.transpose(1, 2)).view(tokens, -1, tokens)
        torch.bmm(index.weights_BTI[0][:, None], dots.relu()).sum().backward()

    def everywhere(window: int | None) -> float:
        return tokens

    attention = 2 * 4 * (24 + 16) * tokens
    projections = 2 * (24 * 256 + 64 * 16 + 64 * 16)
    expected = 3 * (layer.score_flops(everywhere) - attention + projections) - layer.spared_flops(everywhere)
    assert counter.get_total_flops() == tokens * expected


def test_what_transformers_cannot_say_is_refused() -> None:
    found = family("deepseek_v32")
    assert found.hf is not None
    config = found.flavors["debug"]()
    config.blocks["moe"].mixer.indexer = None
    with pytest.raises(
        ConfigError, match="wants kind = 'mla' with an indexer, as DeepseekV32ForCausalLM has"
    ):
        found.hf.config_to_hf(config)
    said = found.hf.config_to_hf(found.flavors["debug"]())
    with pytest.raises(ConfigError, match="full_attention is none of indexed_attention"):
        found.config_from_hf({**said, "layer_types": ["full_attention"] * 4})
