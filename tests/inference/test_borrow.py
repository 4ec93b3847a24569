"""A trainer finds its model as it left it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanovl.inference.engine import Engine
from nanovl.inference.request import Request

BuildModel = Callable[..., nn.Module]
TOKENS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["nanochat", "qwen3"])
def test_the_model_trains_as_before(build_model: BuildModel, family: str) -> None:
    model = build_model(family).train()
    model.norm.eval()  # a part may be frozen
    modules, modes = list(model.named_modules()), [m.training for m in model.modules()]
    before, rng = gradients(model), torch.get_rng_state()
    engine = Engine(model)
    engine.generate([[1, 2, 3], [4]], max_tokens=5, temperature=1.0)
    engine.add(Request(prompt_ids=[1, 2], max_tokens=9))
    engine.step()  # and in the middle of a request
    assert list(model.named_modules()) == modules
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    after = gradients(model)
    assert len(before) == len(list(model.parameters()))
    assert all(torch.equal(after[name], grad) for name, grad in before.items())


def test_the_engine_evaluates_and_keeps_no_graph(build_model: BuildModel) -> None:
    model, found = build_model("qwen3").train(), []

    def look(module: nn.Module, args: Any) -> None:
        found.append((module.training, torch.is_grad_enabled()))

    model.layers["0"].register_forward_pre_hook(look)
    Engine(model).generate([[1]], max_tokens=2)
    assert found == [(False, False)] * 2


def test_the_model_is_given_back_after_an_error(build_model: BuildModel) -> None:
    model = build_model("nanochat").train()
    modules = list(model.named_modules())
    engine = Engine(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.layers["2"].register_forward_hook(interrupt)
    for _ in range(2):
        engine.add(Request(prompt_ids=[1, 2, 3], max_tokens=5))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    handle.remove()
    assert list(model.named_modules()) == modules
    assert model.training
    assert torch.is_grad_enabled()
    assert not engine.busy
    assert (
        engine.generate([[1, 2, 3]], max_tokens=5)[0].ids
        == Engine(model).generate([[1, 2, 3]], max_tokens=5)[0].ids
    )


def test_new_weights_are_used_at_once(build_model: BuildModel) -> None:
    model = build_model("nanochat")
    engine = Engine(model)
    before = engine.generate([[1, 2, 3]], max_tokens=8)[0].ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(0.05)
    after = engine.generate([[1, 2, 3]], max_tokens=8)[0].ids
    assert after != before
    assert after == Engine(model).generate([[1, 2, 3]], max_tokens=8)[0].ids


def test_compiled_blocks_are_neither_used_nor_compiled_anew(build_model: BuildModel) -> None:
    torch._dynamo.reset()
    model, expected = (
        build_model("nanochat"),
        Engine(build_model("nanochat")).generate([[1, 2, 3]], max_tokens=12),
    )
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in model.blocks():
        block.compile(backend=backend, fullgraph=True)
    before = gradients(model)
    compiled = len(graphs)
    assert compiled > 0
    assert Engine(model).generate([[1, 2, 3]], max_tokens=12)[0].ids == expected[0].ids
    assert len(graphs) == compiled
    after = gradients(model)
    assert len(graphs) == compiled
    assert all(torch.equal(after[name], grad) for name, grad in before.items())
