"""Random decoders across all architectures: each runs forward, backward and cached decode, and decode equals prefill.

One packed row holds the engine's three requests as documents; its log-probabilities are those of the engine, which fed
the prompts in chunks and side by side, and then token after token.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from combinations import LAYERS, choices, draw_decoder, fields_of
from torch import Tensor, nn

from nanovl.inference.engine import Engine
from nanovl.models.blocks.mla import LatentAttention
from nanovl.models.blocks.mtp import with_ahead
from nanovl.models.blocks.sparse_core import SparseCore, index_losses
from nanovl.models.decoder import BlockConfig, Decoder, DecoderConfig
from nanovl.parallelisms.init import init_weights
from nanovl.spec import expert_layers, run_batch
from nanovl.step import cross_entropies, loss_weights, mtp_factor

DEFAULT, ALL = 40, 340
PROMPTS = (1, 3, 12)
NEW_TOKENS = 5
FAR = 2e-4
"""Of a log-probability, in float32: in another order of sums; the largest seen is 6e-5, of gated DeltaNet."""


def seeds() -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n >= DEFAULT else []) for n in range(ALL)]


def built(config: DecoderConfig, seed: int) -> Decoder:
    """Weights that begin as they would, and are then moved, so that nothing is zero and no expert like another."""
    model = Decoder(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), name
            spread = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter += torch.randn(parameter.shape, generator=generator) * spread
        for layer in expert_layers(model):
            if layer.router.expert_bias is not None:
                layer.router.expert_bias.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("seed", seeds())
def test_runs_and_decodes_as_it_prefills(seed: int) -> None:
    config = draw_decoder(seed)
    model = built(config, seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in PROMPTS]
    completions = Engine(model, prefill_tokens=5).generate(prompts, max_tokens=NEW_TOKENS)
    rows = [torch.tensor([*prompt, *c.ids]) for prompt, c in zip(prompts, completions, strict=True)]

    for layer in expert_layers(model):
        layer.router.step_tokens = sum(map(len, rows))
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    logits = model(torch.cat(rows)[None], positions, (positions == 0).cumsum(1))
    assert torch.isfinite(logits).all(), config
    chosen: list[Tensor] = []
    for row, prompt, part in zip(rows, prompts, logits[0].split([len(row) for row in rows]), strict=True):
        logprobs = part.log_softmax(-1)[len(prompt) - 1 : -1]
        chosen.append(logprobs.gather(1, row[len(prompt) :, None])[:, 0])
    found = torch.tensor([c.logprobs for c in completions])
    far = (found - torch.stack(chosen)).abs().max()
    assert far <= FAR, f"{far:.2g}: {config}"

    again = Engine(model).generate([row[:-1].tolist() for row in rows], max_tokens=1)
    far = (found[:, -1] - torch.tensor([c.logprobs[0] for c in again])).abs().max()
    assert far <= FAR, f"prefilled at once: {far:.2g}: {config}"

    indexers = index_losses(model)
    for indexer in indexers:  # they learn in a step alone, in which attention may see more keys
        indexer.step_tokens = sum(map(len, rows))
    if indexers:
        logits = model(torch.cat(rows)[None], positions, (positions == 0).cumsum(1))
    loss = nn.functional.cross_entropy(logits[0, :-1], torch.cat(rows)[1:])
    (loss + loss_ahead(model, torch.cat(rows)[None], positions)).backward()
    for name, parameter in model.named_parameters():
        if name in without_a_loss(model):
            assert parameter.grad is None, f"{name} has no loss: {config}"
            continue
        assert parameter.grad is not None, f"{name} takes no part: {config}"
        assert torch.isfinite(parameter.grad).all(), f"gradient of {name}: {config}"


def without_a_loss(model: Decoder) -> set[str]:
    """Parameters of indexers that nobody teaches."""
    return {
        name
        for path, layer in model.named_modules()
        if isinstance(layer, LatentAttention) and layer.indexer is not None
        for name, _ in layer.indexer.named_parameters(f"{path}.indexer")
        if isinstance(layer.core, SparseCore) and layer.core.loss is None
    }


def loss_ahead(model: Decoder, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Of multi-token prediction, where there is any."""
    weights_BT = torch.ones_like(tokens_BT, dtype=torch.float32)
    whole = {"tokens_BT": tokens_BT, "targets_BT": tokens_BT.roll(-1, 1), "weights_BT": weights_BT}
    places = {"positions_BT": positions_BT, "doc_ids_BT": (positions_BT == 0).cumsum(1)}
    batch = with_ahead({**whole, **places}, model.mtp_layers)
    factor, denominators = mtp_factor(model), loss_weights(batch).float()
    objective = partial(cross_entropies, denominators=denominators, mtp_factor=factor, chunk_tokens=16)
    losses: Tensor = run_batch(model, batch, objective)
    assert torch.isfinite(losses).all(), model.config
    return losses[1:].sum()


def test_every_value_of_every_field_is_drawn() -> None:
    """By all seeds; by those of the default run every kind of section, and every choice that has a name."""
    drawn = [set(map(repr, fields_of(draw_decoder(seed)))) for seed in range(ALL)]
    early, everything = set().union(*drawn[:DEFAULT]), set().union(*drawn)
    kinds: list[type[Any]] = [DecoderConfig, BlockConfig]
    for kind in kinds:  # which grows
        for name, values in choices(kind, LAYERS).items():
            for value in values:
                told = repr((f"{kind.__name__}.{name}", value))
                assert told in everything, f"{told} is never drawn; more seeds, or no such value"
                if isinstance(value, str | type):
                    assert told in early, f"{told} is not among the first {DEFAULT} seeds"
                if isinstance(value, type) and value not in kinds:
                    kinds.append(value)
    assert len(kinds) >= 10


def test_a_field_without_values_is_told() -> None:
    @dataclasses.dataclass
    class Wider(BlockConfig):
        width: int = 3

    with pytest.raises(AssertionError, match=r"Wider\.width: give it values"):
        choices(Wider)
