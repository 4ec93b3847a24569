"""The expert block alone: against a loop over tokens, hand-worked numbers, and its traps."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from nanovl.config.schema import ActivationCheckpoint, Model
from nanovl.errors import ConfigError
from nanovl.models.blocks.mlp import Mlp, MlpConfig, swiglu_clamped
from nanovl.models.blocks.moe import (
    Moe,
    MoeConfig,
    _BiasOfRows,
    can_group,
    grouped_product,
    product_by_expert,
)
from nanovl.parallelisms.compile import apply_compile, graphs
from nanovl.parallelisms.init import init_weights, materialize, named_generator
from nanovl.parallelisms.memory import apply_activation_checkpointing
from nanovl.registry import resolve_model, spec_from_dict, spec_to_dict
from nanovl.spec import expert_layers

D = 8


def config_of(**changes: Any) -> MoeConfig:
    return MoeConfig(**{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, **changes})


def moe_of(hidden: int = D, seed: int = 0, **changes: Any) -> Moe:
    moe = Moe(config_of(**changes), hidden)
    for name, parameter in moe.named_parameters():
        nn.init.normal_(parameter, std=0.4, generator=named_generator(seed, name))
    return moe


def tokens(rows: int = 3, length: int = 5, hidden: int = D, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, hidden, generator=torch.Generator().manual_seed(seed))


def token_by_token(moe: Moe, x_BTD: Tensor) -> Tensor:
    """The definition, one token and one expert at a time."""
    routing, experts = moe.router(x_BTD), moe.experts
    act = F.silu if moe.experts.inner.activation == "silu" else partial(F.gelu, approximate="tanh")
    outputs = []
    chosen = zip(x_BTD.flatten(0, 1), routing.experts_NA, routing.weights_NA, strict=True)
    for x, indices, weights in chosen:
        total = torch.zeros_like(x)
        for e, weight in zip(indices.tolist(), weights, strict=True):
            gate, up = experts.gate_proj[e] @ x, experts.up_proj[e] @ x
            if hasattr(experts, "down_proj_bias"):
                gate, up = gate + experts.gate_proj_bias[e], up + experts.up_proj_bias[e]
                total = total + weight * experts.down_proj_bias[e]
            total = total + weight * (experts.down_proj[e] @ (act(gate) * up))
        outputs.append(total)
    out_BTD = torch.stack(outputs).view_as(x_BTD)
    if moe.shared_expert is not None:
        gate = 1.0 if moe.shared_expert_gate is None else moe.shared_expert_gate(x_BTD).sigmoid()
        out_BTD = out_BTD + gate * moe.shared_expert(x_BTD)
    return out_BTD * moe.output_scale


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_intermediate_size": 7},  # no whole 16 bytes: one product an expert
        {"scoring": "sigmoid", "routed_scaling_factor": 2.5, "n_group": 3, "topk_group": 2},
        {"shared_expert_intermediate_size": 10, "shared_expert_gate": True, "norm_topk_prob": False},
        {"bias": True, "router_bias": True, "shared_expert_intermediate_size": 8},
        {"bias": True, "moe_intermediate_size": 7, "activation": "gelu_tanh", "output_scale": 0.7},
    ],
    ids=["softmax", "unaligned", "sigmoid in groups", "shared", "biases", "biases, unaligned"],
)
def test_same_as_token_by_token(changes: dict[str, Any]) -> None:
    moe, x = moe_of(**changes), tokens().requires_grad_()
    wanted = [x, *moe.parameters()]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    expected = token_by_token(moe, x)
    found = moe(x)
    torch.testing.assert_close(found, expected)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 7], [0, 0, 0], [10, 0, 0], [0, 0, 1]])
def test_grouped_product_equals_one_by_one(dtype: torch.dtype, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 24, 16, generator=generator).to(dtype).requires_grad_()
    assert can_group(weight)
    ours, theirs = (f(x, weight, torch.tensor(counts)) for f in (grouped_product, product_by_expert))
    assert torch.equal(ours, theirs)
    # of a sum: a gradient of strides 0
    found = torch.autograd.grad(ours.sum(), (x, weight))
    expected = torch.autograd.grad(theirs.sum(), (x, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_row_is_left_uninitialised(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = moe_of(hidden=16, moe_intermediate_size=16), tokens(hidden=16)
    expected = moe(x)
    torch.use_deterministic_algorithms(True)  # then torch fills what it does not compute with NaN
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        short = grouped_product(torch.ones(4, 16), moe.experts.gate_proj, torch.tensor([3, 0, 0, 0, 0, 0]))
        assert short[3].isnan().all()
        assert not short[:3].isnan().any()
        assert torch.equal(moe(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def with_logits(moe: Moe, logits: list[float]) -> Tensor:
    """A token [1, 1, D] whose router logits are these."""
    moe.router.weight.data.zero_()
    moe.router.weight.data[:, 0] = torch.tensor(logits)
    return F.one_hot(torch.tensor([[0]]), D).float()


def test_routing_by_hand() -> None:
    logits = [math.log(p) for p in (1, 6, 2, 3, 4, 4.5)]  # softmax: these over 20.5
    moe = moe_of()
    routing = moe.router(with_logits(moe, logits))
    assert routing.experts_NA.tolist() == [[1, 5]]
    torch.testing.assert_close(routing.weights_NA, torch.tensor([[6 / 10.5, 4.5 / 10.5]]))
    assert routing.counts_E.tolist() == [0, 1, 0, 0, 0, 1]
    raw = moe_of(norm_topk_prob=False, routed_scaling_factor=2.0)
    weights = raw.router(with_logits(raw, logits)).weights_NA
    torch.testing.assert_close(weights, torch.tensor([[12 / 20.5, 9 / 20.5]]))
    # groups (1, 6) (2, 3) (4, 4.5): sums of sigmoids 1/2 + 6/7, 2/3 + 3/4, 4/5 + 4.5/5.5: the first loses
    groups = moe_of(scoring="sigmoid", n_group=3, topk_group=2)
    routing = groups.router(with_logits(groups, logits))
    assert routing.experts_NA.tolist() == [[5, 4]]


def test_router_bias_and_cap_by_hand() -> None:
    moe = moe_of(router_bias=True, router_logit_softcapping=2.0, norm_topk_prob=False)
    moe.router.bias.data = torch.tensor([0.0, 3.0, 0, 0, 0, 0])
    routing = moe.router(with_logits(moe, [9.0, -2.0, 0.5, 0, 0, 0]))
    capped = [2 * math.tanh(logit / 2) for logit in (9.0, 1.0, 0.5, 0, 0, 0)]
    total = sum(math.exp(logit) for logit in capped)
    assert routing.experts_NA.tolist() == [[0, 1]]
    expected = torch.tensor([[math.exp(capped[0]) / total, math.exp(capped[1]) / total]])
    torch.testing.assert_close(routing.weights_NA, expected)


def test_clamped_swiglu_by_hand() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    gate, up = torch.tensor([2.0, 9.0, -9.0, 1.0]), torch.tensor([3.0, -9.0, 8.0, -1.0])
    expected = [
        2 * sigmoid(3.404) * 4,
        7 * sigmoid(11.914) * -6,  # gate below 7, up above -7
        -9 * sigmoid(-15.318) * 8,  # gate unbounded below, up below 7
        0.0,  # up + 1
    ]
    torch.testing.assert_close(swiglu_clamped(gate, up), torch.tensor(expected))
    mlp = Mlp(MlpConfig(intermediate_size=4, activation="swiglu_clamped", bias=True), D)
    inner = swiglu_clamped(mlp.gate_proj(tokens()), mlp.up_proj(tokens()))  # type: ignore[misc]
    assert torch.equal(mlp(tokens()), mlp.down_proj(inner))
    assert MlpConfig(intermediate_size=4, activation="swiglu_clamped", gated=False).mistakes() == [
        "gated = false: swiglu_clamped is a gate; choose another activation"
    ]
    assert MlpConfig(intermediate_size=0).mistakes() == ["intermediate_size = 0: wants a number above 0"]


def test_a_shared_expert_may_have_an_activation_of_its_own() -> None:
    moe = moe_of(shared_expert_intermediate_size=8, shared_expert_activation="gelu_tanh", output_scale=0.5)
    shared, x = moe.shared_expert, tokens()
    assert shared is not None
    alone = moe_of()
    alone.load_state_dict({k: v for k, v in moe.state_dict().items() if "shared" not in k})
    inner = F.gelu(x @ shared.gate_proj.weight.T, approximate="tanh") * (x @ shared.up_proj.weight.T)
    torch.testing.assert_close(moe(x), 0.5 * (alone(x) + inner @ shared.down_proj.weight.T))


def test_bias_gradients_are_sums_in_float32() -> None:
    """4096 rows of 1.001 in bfloat16, added up in bfloat16, would stop at 256."""
    bias = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    rows = _BiasOfRows.apply(bias, torch.tensor([4096, 0, 5]), 4101)
    rows.backward(torch.ones_like(rows))
    assert bias.grad is not None
    assert bias.grad[:, 0].tolist() == [4096, 0, 5]


def test_a_bias_chooses_but_does_not_weigh() -> None:
    moe = moe_of(load_balancing="bias")
    assert moe.router.expert_bias is not None
    moe.router.expert_bias[0] = 10.0
    routing = moe.router(with_logits(moe, [math.log(p) for p in (1, 6, 2, 3, 4, 4)]))
    assert routing.experts_NA.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weights_NA, torch.tensor([[1 / 7, 6 / 7]]))


def test_biases_move_by_the_sign_of_the_load() -> None:
    router = moe_of(load_balancing="bias", bias_update_speed=0.01, aux_loss_coef=0.1).router
    router.rebalance(torch.tensor([4.0, 0, 2, 2, 1, 3], dtype=torch.float64))  # mean 2
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.01, 0.01, 0, 0, 0.01, -0.01]))
    torch.testing.assert_close(router.load, torch.tensor([4.0, 0, 2, 2, 1, 3]) / 12)


def test_frozen_biases_stay_as_they_were_loaded() -> None:
    moe = moe_of(load_balancing="bias", bias_update_speed=0.0)
    loaded = torch.tensor([0.5, -0.25, 0.125, 3.0, 0.0, -1.0])
    moe.router.expert_bias.copy_(loaded)
    moe.router.rebalance(torch.tensor([4.0, 0, 2, 2, 1, 3], dtype=torch.float64))
    assert torch.equal(moe.router.expert_bias, loaded)
    assert (moe.router(tokens()).experts_NA == 3).any(dim=1).all()  # and are still chosen by


def test_scores_are_float32_under_bfloat16() -> None:
    moe = moe_of().bfloat16()
    x = tokens().bfloat16()
    routing = moe.router(x)
    scores = F.linear(x.float(), moe.router.weight.float()).softmax(-1).flatten(0, 1)
    assert routing.weights_NA.dtype == torch.float32
    best = scores.topk(2).values
    torch.testing.assert_close(routing.weights_NA, best / best.sum(-1, keepdim=True))
    assert moe(x).dtype == torch.bfloat16


LOSSES: dict[str, Any] = {"aux_loss_coef": 0.3, "sequence_aux_loss_coef": 0.2, "z_loss_coef": 0.1}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_auxiliary_losses_are_those_of_the_papers_for_any_accumulation(scoring: str) -> None:
    load = torch.tensor([4.0, 0, 2, 2, 1, 3]) / 12  # of the step before
    x_BTD = tokens(rows=4)
    found = []
    for rows_at_once in (4, 1):
        moe = moe_of(scoring=scoring, **LOSSES)
        assert moe.router.load is not None
        moe.router.load.copy_(load)
        moe.router.step_tokens = 20
        for x in x_BTD.split(rows_at_once):
            (moe(x) * 0).sum().backward()  # nothing else has a gradient
        found.append(moe.router.weight.grad)
    torch.testing.assert_close(found[0], found[1])

    weight = moe.router.weight.detach().requires_grad_()
    logits = x_BTD @ weight.T
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    p_BTE = scores / scores.sum(-1, keepdim=True)
    chosen_BTE = F.one_hot(scores.topk(2).indices, 6).sum(2).float()
    f_BE = chosen_BTE.mean(1) / 2
    loss = 0.3 * 6 * (load * p_BTE.mean((0, 1))).sum()
    loss = loss + 0.2 * 6 * (f_BE * p_BTE.mean(1)).sum(1).mean()
    loss = loss + 0.1 * logits.logsumexp(-1).square().mean()
    loss.backward()
    torch.testing.assert_close(found[0], weight.grad)


def test_counts_are_of_training_alone() -> None:
    moe, x = moe_of(), tokens()
    out = moe(x)
    assert moe.router.tally.sum() == 0
    out.sum().backward()
    counts = moe.router(x).counts_E.double()
    assert torch.equal(moe.router.tally[:-1], counts)
    assert counts.sum() == 30
    shares = F.linear(x, moe.router.weight).softmax(-1)
    torch.testing.assert_close(moe.router.tally[-1], -(shares * shares.log()).sum().double())
    with torch.no_grad():
        moe(x)
    assert torch.equal(moe.router.tally[:-1], counts)


@pytest.mark.parametrize("mode", ["full", "op"])
def test_a_recomputed_forward_is_not_counted_twice(mode: Any) -> None:
    spec = resolve_model(Model(name="qwen3_moe", flavor="debug", overrides={"num_hidden_layers": 2}), 64)
    x = torch.arange(40).view(2, 20)
    tallies, gradients = [], []
    for chosen in ("none", mode):
        model = spec.family.model(spec.config)
        init_weights(model, 0)
        assert apply_activation_checkpointing(model, ActivationCheckpoint(mode=chosen)) == 2 * (
            chosen != "none"
        )
        model(x).square().sum().backward()
        tallies.append(torch.stack([layer.router.tally for layer in expert_layers(model)]))
        gradients.append([p.grad for p in model.parameters()])
    assert torch.equal(tallies[0], tallies[1])
    assert tallies[0][:, :-1].sum() == 2 * 40 * 2
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_backward_split_for_a_pipeline_counts_once() -> None:
    """Zero-bubble schedules run the gradients of inputs first and those of weights later."""
    moe, x = moe_of(aux_loss_coef=0.1, z_loss_coef=0.1), tokens().requires_grad_()
    moe.router.step_tokens = 15
    expected = torch.autograd.grad((x + moe(x)).sum(), [x, *moe.parameters()])
    counts = moe.router.tally.clone()
    moe.router.tally.zero_()
    out = x + moe(x)
    (input_grad,), groups = stage_backward_input([out], [torch.ones_like(out)], [x], iter(moe.parameters()))
    stage_backward_weight(iter(moe.parameters()), groups)
    assert torch.equal(moe.router.tally, counts)
    for a, b in zip([input_grad, *(p.grad for p in moe.parameters())], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_auxiliary_losses_ask_for_the_tokens_of_the_step() -> None:
    with pytest.raises(AssertionError, match="begin_step"):
        moe_of(z_loss_coef=0.1)(tokens())


MISTAKES: dict[str, dict[str, Any]] = {
    "num_experts = 0: wants a number above 0": {"num_experts": 0},
    "z_loss_coef = -1.0: wants 0 or more": {"z_loss_coef": -1.0},
    "router_logit_softcapping = 0.0: wants a number above 0": {"router_logit_softcapping": 0.0},
    "output_scale = 0.0: wants a number above 0": {"output_scale": 0.0},
    "shared_expert_activation = 'gelu': there is no shared expert": {"shared_expert_activation": "gelu"},
    "bias_update_speed = -0.1: wants 0 or more": {"load_balancing": "bias", "bias_update_speed": -0.1},
    "shared_expert_gate = true: there is no shared expert": {"shared_expert_gate": True},
    "norm_topk_prob = true: a single expert's weight": {"num_experts_per_tok": 1},
    "num_experts_per_tok = 7: wants at most num_experts = 6": {"num_experts_per_tok": 7},
    "n_group = 4: wants a divisor of num_experts = 6": {"n_group": 4},
    "topk_group = 2: wants at most n_group = 1": {"topk_group": 2},
    "num_experts_per_tok = 4: wants at most the 2 experts": {"n_group": 3, "num_experts_per_tok": 4},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_does_not_fit_together_is_said(message: str) -> None:
    (found,) = config_of(**MISTAKES[message]).mistakes()
    assert found.startswith(message)


def resolve(ffn: dict[str, Any]) -> Any:
    return resolve_model(
        Model(name="qwen3_moe", flavor="debug", overrides={"blocks": {"full": {"ffn": ffn}}}), 64
    )


def test_config_of_either_kind_goes_to_meta_json_and_back() -> None:
    for ffn in ({"scoring": "sigmoid", "n_group": 2}, {"kind": "mlp", "intermediate_size": 16}):
        spec = resolve(ffn)
        assert spec_from_dict(spec_to_dict(spec)).config == spec.config
        assert {k: getattr(spec.config.blocks["full"].ffn, k) for k in ffn} == ffn


@pytest.mark.parametrize(
    ("ffn", "message"),
    [
        ({"num_expert": 4}, "model.blocks.full.ffn.num_expert: no such key; did you mean 'num_experts'?"),
        ({"kind": "conv"}, "wants a table with a `kind` that is 'mlp' or 'moe'"),
        ({"kind": "mlp"}, "model.blocks.full.ffn.intermediate_size: missing"),
        ({"num_experts_per_tok": 9}, "model.blocks.full.ffn.num_experts_per_tok = 9: wants at most"),
    ],
)
def test_errors_speak_of_the_kind_that_is_meant(ffn: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ffn)
    (found,) = caught.value.mistakes
    assert message in found


def test_buffers_begin_at_zero_and_only_state_is_kept() -> None:
    spec = resolve({"load_balancing": "bias", "aux_loss_coef": 0.1})
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    materialize(model, torch.device("cpu"))
    buffers = dict(model.named_buffers())
    assert len(buffers) == 4 * 3
    assert not any(buffer.any() for buffer in buffers.values())
    kept = {name.rpartition(".")[2] for name in model.state_dict() if name in buffers}
    assert kept == {"expert_bias", "load"}


@pytest.mark.parametrize("bias", [False, True])
def test_flops_count_a_token_s_own_experts(bias: bool) -> None:
    sizes = {
        "num_hidden_layers": 1,
        "blocks": {
            "full": {"ffn": {"shared_expert_intermediate_size": 10, "bias": bias, "router_bias": bias}}
        },
    }
    spec = resolve_model(Model(name="qwen3_moe", flavor="debug", overrides=sizes), 64)
    model = spec.family.model(spec.config)
    attention = 64 * (8 + 4 + 4) * 16 + 8 * 16 * 64
    ffn = 8 * 64 + 2 * 3 * 64 * 32 + 3 * 64 * 10  # router, 2 of 8 experts, shared expert
    head = spec.config.vocab_size * 64
    assert model.forward_flops_per_token(lambda window: 0.0) == 2 * (attention + ffn + head)


def test_released_sizes() -> None:
    for flavor, total in (("30b-a3b", 30_532_122_624), ("235b-a22b", 235_093_634_560)):
        spec = resolve_model(Model(name="qwen3_moe", flavor=flavor), 151_936)
        with torch.device("meta"):
            model = spec.family.model(spec.config)
        assert sum(p.numel() for p in model.parameters()) == total


def test_compiled_parts_leave_routing_alone() -> None:
    overrides = {"num_hidden_layers": 1, "blocks": {"full": {"ffn": {"shared_expert_intermediate_size": 16}}}}
    spec = resolve_model(Model(name="qwen3_moe", flavor="debug", overrides=overrides), 64)
    model = spec.family.model(spec.config)
    init_weights(model, 0)
    x = torch.arange(40).view(2, 20)
    expected = model(x)
    assert [type(m).__name__ for m in graphs(model.blocks()[0])] == ["Attention", "GatedActivation", "Mlp"]
    assert apply_compile(model, "aot_eager") == 1
    torch.testing.assert_close(model(x), expected)
    model(x[:, :7]).sum().backward()  # other numbers of rows
