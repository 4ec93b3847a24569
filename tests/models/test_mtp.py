"""Multi-token prediction: what each depth reads and predicts, its loss written out, its cost."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanovl.build import matrix_parameters
from nanovl.config.schema import Model
from nanovl.errors import ConfigError
from nanovl.flops import causal_keys, training_flops_per_token
from nanovl.inference.cache import KVCache
from nanovl.models.blocks.mtp import with_ahead
from nanovl.models.decoder import Decoder
from nanovl.optim.groups import assign
from nanovl.registry import MODELS, family, read_job, resolve_model, spec_from_dict, spec_to_dict
from nanovl.report.facts import parameter_counts
from nanovl.spec import IGNORE_INDEX, Batch, Inputs, ModelSpec, run_batch
from nanovl.step import cross_entropies, loss_weights, mtp_factor

CONFIG = Path(__file__).parents[2] / "configs" / "debug.toml"
VOCAB = 96
NONE = IGNORE_INDEX
DOCUMENTS = [(0, 3), (3, 7), (7, 8), (8, 9)]


def spec(**overrides: Any) -> ModelSpec:
    return resolve_model(
        Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": 2, **overrides}), VOCAB
    )


def decoder(**overrides: Any) -> Decoder:
    found = spec(**overrides)
    model = cast(Decoder, found.family.model(found.config))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def row() -> Batch:
    """Documents of 3, 4 and 1 tokens and a slot of padding; a target in the second is masked."""
    return {
        "tokens_BT": torch.tensor([[10, 11, 12, 20, 21, 22, 23, 30, 9]]),
        "targets_BT": torch.tensor([[11, 12, 20, 21, NONE, 23, 30, 31, NONE]]),
        "doc_ids_BT": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 3]]),
        "positions_BT": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]]),
        "weights_BT": torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]]),
    }


def test_each_depth_reads_and_predicts_further_on_in_its_document() -> None:
    found = with_ahead(row(), 3)
    targets, tokens, weights = (found[f"ahead_{name}BTU"][0].T for name in ("targets_", "", "weights_"))
    assert targets.tolist() == [
        [12, 20, NONE, NONE, 23, 30, NONE, NONE, NONE],
        [20, NONE, NONE, 23, 30, NONE, NONE, NONE, NONE],
        [NONE, NONE, NONE, 30, NONE, NONE, NONE, NONE, NONE],
    ]
    assert tokens[targets >= 0].tolist() == [11, 12, 22, 23, 12, 22, 23, 23]
    assert weights[targets >= 0].tolist() == [2, 3, 6, 7, 3, 6, 7, 7]
    assert loss_weights(found).tolist() == [31, 18, 16, 7]
    assert loss_weights(row()).tolist() == [31]


def test_logits_of_depths_are_scaled_like_those_of_the_next_token() -> None:
    plain, scaled = (decoder(mtp={"num_layers": 2}, logit_scale=scale) for scale in (1.0, 0.5))
    batch = with_ahead(row(), 2)
    for ones, halves in zip(
        *(run_batch(model, batch, lambda head, x, _, *ahead: [x, *ahead]) for model in (plain, scaled)),
        strict=True,
    ):
        torch.testing.assert_close(0.5 * ones, halves, rtol=1e-4, atol=1e-5)


def test_depths_beyond_the_row_have_no_target() -> None:
    assert (with_ahead(row(), 12)["ahead_targets_BTU"][..., 3:] == NONE).all()
    assert "ahead_BTU" not in with_ahead(row(), 0)


def test_a_row_of_one_document_is_cut_at_its_end_alone() -> None:
    one = {**row(), "doc_ids_BT": torch.zeros(1, 9, dtype=torch.int64)}
    found = with_ahead(one, 1)["ahead_targets_BTU"][0, :, 0]
    assert found.tolist() == [12, 20, 21, NONE, 23, 30, 31, NONE, NONE]


def losses(model: Any, batch: Batch) -> Tensor:
    batch = with_ahead(batch, model.mtp_layers)
    denominators = loss_weights(batch).float()
    objective = partial(
        cross_entropies, denominators=denominators, mtp_factor=mtp_factor(model), chunk_tokens=4
    )
    return cast(Tensor, run_batch(model, batch, objective))


def written_out(model: Decoder, batch: Batch, denominators: list[float]) -> list[Tensor]:
    """Mean loss of the next token and of each depth, every document alone and a depth shorter by its k tokens."""
    config = model.config.mtp
    sums = [torch.zeros(())] * (1 + config.num_layers)
    seen: list[Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for a, b in DOCUMENTS:
        tokens, targets, weights = (batch[key][:, a:b] for key in ("tokens_BT", "targets_BT", "weights_BT"))
        ended = model(tokens, objective=lambda head, x_BTD: x_BTD)
        hidden = ended if config.hidden == "post_norm" else seen[-1]
        nll = F.cross_entropy(
            model.lm_head(ended).flatten(0, 1), targets.flatten(), ignore_index=NONE, reduction="none"
        )
        sums[0] = sums[0] + (nll * weights.flatten()).sum()
        for k, module in enumerate(model.mtp.values(), 1):
            if b - a <= k:
                break
            positions = torch.arange(b - a - k)[None]
            inputs = Inputs(tokens[:, :-k], positions, model.meta(positions, None))
            both = torch.cat(
                (module.enorm(model.embed_tokens(tokens[:, k:])), module.hnorm(hidden[:, :-1])), -1
            )
            x = module.block(module.eh_proj(both), inputs)
            ended = module.norm(x)
            hidden = ended if config.hidden == "post_norm" else x
            logits = model.lm_head(ended).flatten(0, 1)
            nll = F.cross_entropy(logits, targets[:, k:].flatten(), ignore_index=NONE, reduction="none")
            sums[k] = sums[k] + (nll * weights[:, k:].flatten()).sum()
    handle.remove()
    return [total / denominator for total, denominator in zip(sums, denominators, strict=True)]


@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
def test_loss_and_gradients_are_those_written_out(hidden: str) -> None:
    model = decoder(mtp={"num_layers": 2, "hidden": hidden, "loss_weight": 0.5})
    other = deepcopy(model)
    found = losses(model, row())
    expected = written_out(other, row(), [31, 18, 16])
    # half of the mean of two depths: a quarter each
    torch.testing.assert_close(found, torch.stack([expected[0], expected[1] / 4, expected[2] / 4]))
    found.sum().backward()
    (expected[0] + 0.5 * (expected[1] + expected[2]) / 2).backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(
            mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", MODELS)
def test_modules_of_every_family_begin_learn_and_have_an_optimizer(name: str) -> None:
    """`nanovl/models/nanochat.py` has modules of its own, compared with its formulas in test_nanochat.py."""
    flavor = "debug" if "debug" in family(name).flavors else "d4"
    found = resolve_model(Model(name=name, flavor=flavor, overrides={"mtp": {"num_layers": 2}}), VOCAB)
    model = found.family.model(found.config)
    model.init_buffers(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        model.init_parameter(key, parameter.data.fill_(torch.nan), generator)
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    taken = [
        key
        for group in assign(model.named_parameters(), found.family.optimizer_groups(found.config))
        for key, _ in group.parameters
    ]
    assert sorted(taken) == sorted(key for key, _ in model.named_parameters())
    found_losses = losses(model, row())
    assert found_losses.shape == (3,)
    found_losses.sum().backward()
    for key, parameter in model.named_parameters():
        # an expert may have no token, an indexer learns by a loss of its own
        if key.startswith("mtp.") and ".experts." not in key and ".indexer." not in key:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


def test_what_is_read_beyond_a_document_reaches_no_loss() -> None:
    model, batch = decoder(mtp={"num_layers": 2}), with_ahead(row(), 2)
    none_there = batch["ahead_targets_BTU"] < 0
    # a masked target inside a document is still read by those behind it
    none_there[0, 3, 0] = none_there[0, 2, 1] = False
    changed = {**batch, "ahead_BTU": batch["ahead_BTU"].masked_fill(none_there, 77)}
    objective = partial(cross_entropies, denominators=torch.ones(3), mtp_factor=1.0, chunk_tokens=4)
    assert torch.equal(run_batch(model, batch, objective), run_batch(model, changed, objective))


@pytest.mark.parametrize("name", ["qwen3", "nanochat"])  # the two classes of models
def test_nothing_of_it_runs_or_is_cached_outside_of_training(name: str) -> None:
    flavor = "debug" if name == "qwen3" else "d4"
    plain, model = (
        family(name).model(resolve_model(Model(name=name, flavor=flavor, overrides=over), VOCAB).config)
        for over in ({}, {"mtp": {"num_layers": 2}})
    )
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.load_state_dict(plain.state_dict(), strict=False)
    for module in model.mtp.values():
        module.forward = None  # so that running it would raise
    tokens_BT = row()["tokens_BT"]
    assert torch.equal(model(tokens_BT), plain(tokens_BT))
    caches = [KVCache(m) for m in (plain, model)]
    for cache in caches:
        cache.reserve(2, 64)
    assert caches[0].memory() == caches[1].memory()
    assert len(caches[0]._seats) == len(caches[1]._seats) > 0


def test_flops_equal_those_torch_counts() -> None:
    model = decoder(mtp={"num_layers": 2}, blocks={"full": {"mixer": {"kernel": "eager"}}})
    batch = {key: value.repeat(2, 5) for key, value in row().items()}
    batch["doc_ids_BT"] = torch.zeros_like(batch["doc_ids_BT"])

    def logits(head: Any, *states: Any) -> Tensor:
        x_BTD, _, *ahead = states
        return torch.stack([head(x).sum() for x in (x_BTD, *ahead)]).sum()

    with FlopCounterMode(display=False) as counter:
        run_batch(model, with_ahead(batch, 2), logits)
    assert counter.get_total_flops() == 90 * model.forward_flops_per_token(lambda window: 45)


def test_parameters_are_counted() -> None:
    plain, found = spec(), spec(mtp={"num_layers": 2})
    layer = sum(p.numel() for p in plain.family.model(plain.config).layers["1"].parameters())
    size = plain.config.hidden_size
    assert parameter_counts(found)[0] - parameter_counts(plain)[0] == 2 * (layer + 3 * size + 2 * size * size)
    weights = layer - 2 * size - 2 * plain.config.blocks["full"].mixer.head_dim  # without its norms
    assert matrix_parameters(found) - matrix_parameters(plain) == 2 * (weights + 2 * size * size)


@pytest.mark.parametrize(
    ("name", "flavor", "parameters"),
    [
        # transformers' MtpModel of these configs, built on the meta device
        ("deepseek_v3", "671b-a37b", 11.610e9),
        ("glm4_moe", "106b-a12b", 2.375e9),
        ("glm4_moe", "355b-a32b", 3.988e9),
    ],
)
def test_released_sizes(name: str, flavor: str, parameters: float) -> None:
    vocab = family(name).flavors[flavor]().vocab_size
    plain, found = (
        resolve_model(Model(name=name, flavor=flavor, overrides=overrides), vocab)
        for overrides in ({}, {"mtp": {"num_layers": 1}})
    )
    more = parameter_counts(found)[0] - parameter_counts(plain)[0]
    assert more == pytest.approx(parameters, rel=1e-4)
    if name == "deepseek_v3":
        with torch.device("meta"):
            flops = [
                training_flops_per_token(s.family.model(s.config), causal_keys(4096)) for s in (plain, found)
            ]
        # 6 x (attention, 8 of 256 experts, shared one, router, eh_proj, head) + 6 x 128 heads x 320 x 2048.5 keys
        assert flops[1] - flops[0] == pytest.approx(10.19e9, rel=1e-3)


def test_a_module_is_built_of_the_named_template() -> None:
    found = resolve_model(
        Model(name="olmo3", flavor="debug", overrides={"mtp": {"block": "sliding", "loss_weight": 0.1}}),
        VOCAB,
    )
    model = found.family.model(found.config)
    modules = {
        name: module.block.mixer.config.sliding_window
        for name, module in model.get_submodule("mtp").named_children()
    }
    assert modules == {"4": found.config.blocks["sliding"].mixer.sliding_window}
    assert (model.mtp_layers, model.mtp_loss_weight) == (1, 0.1)
    assert spec_from_dict(spec_to_dict(found)).config == found.config


def test_mistakes() -> None:
    with pytest.raises(ConfigError) as error:
        spec(mtp={"num_layers": 0, "loss_weight": 0.0, "block": "ful"})
    assert error.value.mistakes == [
        "model.mtp.num_layers = 0: wants 1 or more; set mtp to none to predict one token alone",
        "model.mtp.loss_weight = 0.0: wants a number above 0; set mtp to none to train without",
        "model.mtp.block = 'ful': is no block; choose from full",
    ]
    flags = ["--training.seq_len=8", "--model.mtp.num_layers=8"]
    with pytest.raises(ConfigError) as error:
        read_job([CONFIG], flags)
    beyond = "the last of them would predict beyond rows of training.seq_len = 8; use fewer, or none"
    assert error.value.mistakes == [f"model.mtp.num_layers = 8: {beyond}"]
    read_job([CONFIG], ["--training.seq_len=8", "--model.mtp.num_layers=7"])
