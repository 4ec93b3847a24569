"""Tensor parallelism against one rank, alone and under everything that wraps it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from meshes import GRADIENT, LOSS, WEIGHT, assert_same, job_of

from nanovl.build import build_model
from nanovl.config.schema import ActivationCheckpoint, Compile, Job, Tokenizer
from nanovl.device import Modes
from nanovl.dist import fork_ranks
from nanovl.inference.uncached import generate_uncached
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.registry import resolve_model
from nanovl.tokenizer.bpe import Tokenizer as Bytes
from nanovl.verify import CPU, Difference, compare, on_one_rank, outcome_on, shake

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "world", "fields"),
    [
        ("qwen3", 2, {}),
        ("nanochat", 4, {}),
        pytest.param("qwen3 tied", 2, {}, marks=SLOW),
        pytest.param("qwen3 tied", 4, {}, marks=SLOW),
        pytest.param("nanochat", 2, {}, marks=SLOW),
        pytest.param("qwen3", 4, {"tensor_parallel_degree": 4}, marks=SLOW),
        pytest.param("nanochat", 4, {"tensor_parallel_degree": 4}, marks=SLOW),
        pytest.param("qwen3", 8, {"data_parallel_replicate_degree": 2}, marks=SLOW),
        pytest.param("nanochat", 8, {"data_parallel_replicate_degree": 2}, marks=SLOW),
        pytest.param("qwen3", 4, {"fsdp_reduce_last_only": True}, marks=SLOW),
        # pieces that 3 data ranks cannot share evenly
        pytest.param("nanochat", 6, {"rows": 12}, marks=SLOW),
    ],
)
def test_same_as_one_rank(model: str, world: int, fields: dict[str, Any]) -> None:
    assert_same(job_of(model, **{"tensor_parallel_degree": 2, **fields}), model, world)


def small(model: str, degree: int, mixer: dict[str, Any] | None = None, **overrides: Any) -> Job:
    """Two layers, four for nanochat."""
    job = job_of(model, tensor_parallel_degree=degree)
    layers = {} if model == "nanochat" else {"num_hidden_layers": 2}
    blocks = {"blocks": {"full": {"mixer": mixer}}} if mixer else {}
    settings = {**job.model.overrides, **layers, **blocks, **overrides}
    return replace(job, model=replace(job.model, overrides=settings))


def far(job: Job, world: int, steps: int = 2) -> Difference:
    found, expected = outcome_on(job, world, steps), outcome_on(on_one_rank(job), 1, steps)
    assert found.initial == expected.initial
    return compare(found, expected)


def assert_close(difference: Difference) -> None:
    assert difference.loss < LOSS, difference
    assert max(difference.norm, difference.gradient) < GRADIENT, difference
    assert difference.weight < WEIGHT, difference


@pytest.mark.parametrize(
    ("job", "world"),
    [
        (small("qwen3", 4, {"num_key_value_heads": 2, "qk_norm": "full"}), 4),
        (small("qwen3 tied", 2, {"qkv_bias": True}, embed_norm=True, final_logit_softcapping=5.0), 2),
        pytest.param(small("qwen3", 4, {"num_key_value_heads": 2}), 4, marks=SLOW),
        pytest.param(small("qwen3", 2, {"qk_norm": "full"}), 2, marks=SLOW),
        pytest.param(small("nanochat", 4, num_key_value_heads=2), 4, marks=SLOW),
        pytest.param(small("nanochat", 2, smear=False), 2, marks=SLOW),
    ],
    ids=[
        "2 key heads of all ranks' width",
        "tied, biases, embedding norm, cap",
        "2 key heads",
        "full width",
        "nanochat, 2 key heads",
        "nanochat that cuts at once",
    ],
)
def test_parts_of_models(job: Job, world: int) -> None:
    assert_close(far(job, world))


@pytest.mark.parametrize("model", ["qwen3", pytest.param("nanochat", marks=SLOW)])
@pytest.mark.parametrize(
    "mode", [pytest.param("full", marks=SLOW), "op", pytest.param("selective", marks=SLOW)]
)
def test_recomputing_activations(model: str, mode: Literal["full", "op", "selective"]) -> None:
    assert_close(far(replace(small(model, 2), activation_checkpoint=ActivationCheckpoint(mode=mode)), 2))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "backend", "mode"),
    [
        ("qwen3", "aot_eager", "full"),
        pytest.param("nanochat", "aot_eager", "op", marks=SLOW),
        pytest.param("qwen3", "inductor", "none", marks=SLOW),
    ],
)
def test_compiled_blocks(model: str, backend: str, mode: Literal["none", "op", "full"]) -> None:
    """On torch 2.13 an embedding whose output a compiled block waits for gets a gradient of zero, without a word."""
    job = replace(
        small(model, 2),
        compile=Compile(enable="on", backend=backend),
        activation_checkpoint=ActivationCheckpoint(mode=mode),
    )
    found = outcome_on(job, 2, 2, timeout_seconds=800)
    assert found.gradients["embed_tokens.weight"].norm() > 0
    assert_close(compare(found, outcome_on(replace(on_one_rank(job), compile=Compile(enable="off")), 1, 2)))


@pytest.mark.parametrize("model", ["qwen3", pytest.param("nanochat", marks=SLOW)])
def test_bfloat16_is_as_near_to_float32_as_on_one_rank(model: str) -> None:
    job = small(model, 2)
    rough = replace(job, training=replace(job.training, mixed_precision_param="bfloat16"))
    exact, alone, cut = (
        outcome_on(on_one_rank(job), 1, 1),
        outcome_on(on_one_rank(rough), 1, 1),
        outcome_on(rough, 4, 1),
    )
    assert cut.losses[0] == pytest.approx(exact.losses[0], rel=1e-3)
    off = {
        name: [float((outcome.gradients[name] - gradient).norm()) for outcome in (cut, alone)]
        for name, gradient in exact.gradients.items()
    }
    total = [sum(pair[i] ** 2 for pair in off.values()) ** 0.5 for i in (0, 1)]
    assert total[0] < 2 * total[1], total


def greedy(rank: int, job: Job, world: int) -> list[list[int]]:
    mesh = build_mesh(job.parallelism, world, CPU)
    spec = resolve_model(job.model, job.tokenizer.vocab_size)
    model = build_model(job, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    shake(model, 3)
    prompts = ["once upon a", "x"]
    found = generate_uncached(model, Bytes([]), prompts, max_tokens=6, temperature=0.0, top_k=0, seed=0)
    return [completion.ids for completion in found]


@pytest.mark.parametrize("model", ["nanochat", pytest.param("qwen3", marks=SLOW)])
def test_greedy_tokens_are_those_of_one_rank(model: str) -> None:
    job = replace(small(model, 2), tokenizer=Tokenizer(vocab_size=266))
    one = fork_ranks(greedy, 1, on_one_rank(job), 1)
    assert max(map(len, one[0])) > 2, one[0]
    assert fork_ranks(greedy, 2, job, 2) == one * 2
