"""FLOPs of every architecture of the registry against torch's own counter, and keys against explicit masks.

What torch counts: written-out attention computes masked scores too, so all keys of a row; experts one by one, since it
counts nothing in a grouped product.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nanovl.config.schema import Job, Model, Tokenizer, Training
from nanovl.data.loader import Loader
from nanovl.flops import MeanKeys, attended_keys, causal_keys, reachable_keys, training_flops_per_token
from nanovl.models.blocks import moe
from nanovl.models.blocks.attention import AttentionCore, visible
from nanovl.models.blocks.delta_rule import CHUNK
from nanovl.models.blocks.gated_delta_net import GatedDeltaNet
from nanovl.models.blocks.mla import LatentAttention
from nanovl.parallelisms.init import init_weights
from nanovl.registry import MODELS, family, read_job, resolve_model
from nanovl.shrink import shrink
from nanovl.tokenizer.bpe import load_tokenizer
from nanovl.trainer import train

TOKENS = CHUNK  # one whole chunk of the delta rule, so that nothing is padded
CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"


def of_delta_rule(mixer: Any) -> tuple[float, float]:
    """Products inside of a chunk instead of the rule's own. Convolution and solving are none to torch, but the gradient
    of what is solved is one. A first chunk's state has no gradient, and the last is not used."""
    heads, x, y = mixer.config.num_value_heads, mixer.config.key_head_dim, mixer.config.value_head_dim
    inside, with_state = 2.0 * CHUNK * (2 * x + y), 2.0 * x * y
    backward = 2 * inside + 2 * with_state + 2.0 * CHUNK * (x + y)
    said = mixer.score_flops(lambda window: TOKENS)
    return heads * (inside + 3 * with_state) - said, heads * backward - 2 * said


def of_experts(layer: Any) -> tuple[float, float]:
    """Weighing the outputs of a token's experts is a product to torch, and here no more than adding them up."""
    weighing = 2.0 * layer.num_experts_per_tok * layer.router.weight.shape[1]
    return weighing, 2 * weighing


def of_indexer(mixer: Any) -> tuple[float, float]:
    """Outside of a training step an indexer has no loss, and so no backward."""
    if mixer.indexer is None:
        return 0.0, 0.0
    projections = 2.0 * sum(p.numel() for p in mixer.indexer.parameters() if p.ndim == 2)
    heads, head_dim = mixer.config.indexer.index_n_heads, mixer.config.indexer.index_head_dim
    return 0.0, -2 * (projections + 2.0 * heads * (head_dim + 1) * TOKENS)


COUNTED_OTHERWISE: dict[type[nn.Module], Callable[[Any], tuple[float, float]]] = {
    GatedDeltaNet: of_delta_rule,
    moe.Moe: of_experts,
    LatentAttention: of_indexer,
}
"""Where torch counts something else: how much more of a token, forward and backward."""


def likeness(name: str) -> Any:
    """The first size of `name` with all its kinds of layers, in small widths."""
    flavor = next(iter(family(name).flavors))
    job = Job(
        model=Model(name=name, flavor=flavor),
        tokenizer=Tokenizer(vocab_size=family(name).flavors[flavor]().vocab_size),
        training=Training(seq_len=4096, global_batch_size=8, steps=10),
    )
    small = shrink(job, resolve_model(job.model, job.tokenizer.vocab_size).config, 1)
    spec = resolve_model(small.model, small.tokenizer.vocab_size)
    model = spec.family.model(spec.config)
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_flops_equal_those_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "can_group", lambda weight: False)
    model = likeness(name)
    for core in (m for m in model.modules() if isinstance(m, AttentionCore)):
        core.scores = core.scores.__class__(**{**vars(core.scores), "kernel": "eager"})
    forward = model.forward_flops_per_token(lambda window: TOKENS)
    backward = 2 * forward
    for module in model.modules():
        if type(module) in COUNTED_OTHERWISE:
            more = COUNTED_OTHERWISE[type(module)](module)
            forward, backward = forward + more[0], backward + more[1]
    tokens = torch.randint(0, model.config.vocab_size, (2, TOKENS))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens)
    assert counter.get_total_flops() == tokens.numel() * forward
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == tokens.numel() * backward


@pytest.mark.parametrize(
    ("name", "context", "billions"),
    [
        ("qwen3:0.6b", 4096, 4.99),
        ("qwen3:8b", 4096, 49.03),
        ("qwen3:8b", 32768, 74.40),
        ("qwen3_moe:30b-a3b", 4096, 23.08),
        ("olmo3:7b", 8192, 46.56),
        ("olmo3:7b", 65536, 58.89),
        ("smollm3:3b", 65536, 47.44),
        ("gemma3:27b", 8192, 166.52),
        ("gemma3:27b", 131072, 196.87),
        ("nanochat_v1:d20", 2048, 3.18),
    ],
)
def test_released_sizes_cost_what_transformers_modules_say(name: str, context: int, billions: float) -> None:
    """Counted once from the shapes of transformers' modules, causal and windowed, in a row that is one document."""
    found, _, flavor = name.partition(":")
    spec = resolve_model(Model(name=found, flavor=flavor), None)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    assert training_flops_per_token(model, causal_keys(context)) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 100])
@pytest.mark.parametrize("lengths", [[[24]], [[24], [24]], [[1, 23], [24]], [[7, 7, 10], [1, 2, 21], [24]]])
def test_attended_keys_are_those_of_the_masks(lengths: list[list[int]], window: int | None) -> None:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    doc_ids = (positions == 0).cumsum(1)
    mask = visible(24, window, doc_ids, positions.device)
    assert mask is not None
    assert attended_keys([positions])(window) == pytest.approx(mask.sum(-1).double().mean().item())
    assert attended_keys(positions.split(1))(window) == attended_keys([positions])(window)


@pytest.mark.parametrize("window", [None, 1, 5, 24, 100])
def test_keys_of_whole_rows(window: int | None) -> None:
    assert causal_keys(24)(window) == attended_keys([torch.arange(24)])(window)
    assert reachable_keys(24)(window) == min(window or 24, 24)


def test_windows_are_seen() -> None:
    model = likeness("olmo3")
    sliding = [b.mixer.config for b in model.blocks() if b.mixer.config.sliding_window is not None]
    everywhere = model.forward_flops_per_token(lambda window: 100)
    windowed = model.forward_flops_per_token(lambda window: 100 if window is None else 30)
    heads, width = sliding[0].num_attention_heads, sliding[0].head_dim
    assert everywhere - windowed == len(sliding) * 2 * heads * 2 * width * 70


def constant(keys: float) -> MeanKeys:
    return lambda window: keys


def masks_of(batch: dict[str, Tensor], window: int | None) -> Tensor:
    mask = visible(batch["tokens_BT"].shape[1], window, batch["doc_ids_BT"], torch.device("cpu"))
    assert mask is not None
    return mask


def test_a_run_counts_its_documents_and_its_utilisation(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows, by explicit masks; the peak is made up, since none is known of a CPU."""
    monkeypatch.setattr("nanovl.trainer.peak_flops", lambda device: 2e12)
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"def f{i}(x): return x + {i}\n" * (1 + i % 7))
    data = f"--data.sources.0.path={tmp_path / 'texts'}"
    flags = [data, "--training.steps=2", "--metrics.log_freq=1", "--model.blocks.full.mixer.sliding_window=9"]
    job = read_job([CONFIG], [*tiny_flags, *flags, f"--job.run_dir={tmp_path / 'run'}"])
    run = train(job)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    first, second = [record for record in records if "flops" in record]
    tokenizer = load_tokenizer(run.tokenizer)
    loader = Loader(read_job([run.folder / "config.json"]), tokenizer, rank=0, degree=1)
    spec = resolve_model(job.model, tokenizer.vocab_size)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    expected = 0.0
    for record in (first, second):
        batches = loader.next_step()
        assert any((batch["doc_ids_BT"] > 0).any() for batch in batches), "no row is packed"
        keys = torch.cat([masks_of(batch, 9).sum(-1).flatten() for batch in batches]).double()
        flops = 3 * model.forward_flops_per_token(constant(keys.mean().item())) * len(keys)
        expected += flops
        assert record["flops"] == pytest.approx(expected, rel=1e-9)
    loader.close()
    rate = second["perf/tokens_per_second"] / 2e12
    assert second["perf/mfu"] == pytest.approx(flops / len(keys) * rate, rel=1e-9)
    dense = 3 * model.forward_flops_per_token(lambda window: 9)
    assert second["perf/mfu_noncausal"] == pytest.approx(dense * rate, rel=1e-9)
    assert second["perf/mfu"] < second["perf/mfu_noncausal"]
