"""Attention over a cut row against plain attention over the whole row; and everything else that sees a cut."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanovl.config.schema import Job, Model, Parallelism
from nanovl.dist import all_reduce, fork_ranks
from nanovl.models.blocks.attention import AttentionCore, MetaBuilder, Scores
from nanovl.models.blocks.rope import RopeConfig, apply_rope
from nanovl.models.nanochat import PreviousToken
from nanovl.parallelisms import context_tiles
from nanovl.parallelisms.context import METHODS, mistakes
from nanovl.parallelisms.context_cores import PreviousAcrossCut
from nanovl.parallelisms.context_cut import SequenceCut, visible_between, whole_row
from nanovl.registry import resolve_model

ROWS, TOKENS, HEADS, HEAD_DIM = 2, 48, 4, 8
PLAIN = Scores()
ROPE = (RopeConfig(), HEAD_DIM)
WINDOWS = (None, 5, 20)
WAYS = [("allgather", True), ("allgather", False), ("ring", True), ("ring", False), ("ulysses", False)]
WAY_IDS = [f"{method} {'headtail' if headtail else 'contiguous'}" for method, headtail in WAYS]


class Case:
    """Made-up rows of packed documents, and queries, keys, values of them."""

    def __init__(self, core: AttentionCore, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        starts = torch.rand(ROWS, TOKENS, generator=generator) < 0.12
        starts[:, 0] = True
        self.doc_ids = starts.long().cumsum(1) - 1
        place = torch.arange(TOKENS).expand(ROWS, TOKENS)
        self.positions = place - torch.where(starts, place, 0).cummax(1).values
        kv_heads, dim, value_dim = core.num_key_value_heads, core.head_dim, core.value_dim
        shapes = [(HEADS, dim), (kv_heads, dim), (kv_heads, value_dim), (HEADS, value_dim)]
        self.q, self.k, self.v, self.dout = (
            torch.randn(ROWS, TOKENS, *shape, generator=generator).to(dtype) for shape in shapes
        )
        self.sinks = torch.randn(HEADS, generator=generator)


def whole_meta() -> MetaBuilder:
    meta = MetaBuilder(())
    meta.windows, meta.ropes = set(WINDOWS), {ROPE}
    return meta


def attention(
    core: AttentionCore, meta: MetaBuilder, case: Case, cut: SequenceCut, documents: bool
) -> list[Tensor]:
    """What comes out for this rank's tokens, and the gradients of its q, k and v before their rotation and of sinks."""
    q, k, v = (cut.mine(x).clone().requires_grad_() for x in (case.q, case.k, case.v))
    given = meta(cut.mine(case.positions), cut.mine(case.doc_ids) if documents else None)
    cos, sin = given.rope[ROPE]
    sinks = {"sinks_H": case.sinks.clone().requires_grad_()} if core.scores.sinks else {}
    out = core(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, given, **sinks)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, *sinks.values()), cut.mine(case.dout))]


@dataclass(frozen=True)
class Layer:
    """An attention layer without window."""

    kv_heads: int = 2
    scores: Scores = PLAIN
    value_dim: int | None = None

    def core(self, window: int | None) -> AttentionCore:
        return AttentionCore(window, self.kv_heads, HEAD_DIM, self.scores, self.value_dim)


def largest_differences(
    rank: int, world: int, method: str, headtail: bool, layer: Layer, dtype: torch.dtype
) -> dict[str, list[float]]:
    """Of output and gradients of q, k, v (and sinks), relative to float32 whole rows, by window and documents."""
    group, cut, whole = dist.group.WORLD, SequenceCut(rank, world, headtail), SequenceCut()
    assert group is not None
    context_tiles.QUERY_TILE = 5  # several tiles a chunk, the last one short
    make_core, make_meta = METHODS[method]
    found = {}
    for window, documents in product(WINDOWS, (True, False)):
        core = layer.core(window)
        case, exact = Case(core, dtype), Case(core)
        exact.q, exact.k, exact.v, exact.dout = (x.float() for x in (case.q, case.k, case.v, case.dout))
        expected = attention(core, whole_meta(), exact, whole, documents)
        cut_core, cut_meta = make_core(core, cut, group), make_meta(whole_meta(), cut, group)
        results = attention(cut_core, cut_meta, case, cut, documents)
        assert all(x.dtype == dtype for x in results[:4])
        pairs = [(a.float(), cut.mine(b)) for a, b in zip(results[:4], expected[:4], strict=True)]
        pairs += [(all_reduce(a), b) for a, b in zip(results[4:], expected[4:], strict=True)]
        found[f"window {window}, documents {documents}"] = [
            float((a - b).norm() / b.norm()) for a, b in pairs
        ]
    return found


@pytest.mark.parametrize(("method", "headtail"), WAYS, ids=WAY_IDS)
@pytest.mark.parametrize(
    ("world", "layer"),
    [
        (2, Layer()),
        (4, Layer()),
        (2, Layer(kv_heads=1)),
        (4, Layer(kv_heads=4)),
        (4, Layer(scores=Scores(scale=0.5, softcap=2.0, sinks=True), value_dim=6)),
        (2, Layer(scores=Scores(temperature_len=4))),
        (4, Layer(scores=Scores(softcap=2.0, temperature_len=3))),
    ],
    ids=[
        "2 ranks",
        "4 ranks",
        "one kv head",
        "4 kv heads",
        "scale, cap, sinks, narrow values",
        "temperature",
        "cap, temperature",
    ],
)
def test_equal_to_attention_over_whole_rows(world: int, layer: Layer, method: str, headtail: bool) -> None:
    for found in fork_ranks(largest_differences, world, world, method, headtail, layer, torch.float32):
        for case, differences in found.items():
            assert all(d < 1e-6 for d in differences), f"{case}: out, dq, dk, dv {differences}"


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_rounds_as_on_one_rank(method: str) -> None:
    for found in fork_ranks(largest_differences, 2, 2, method, method != "ulysses", Layer(), torch.bfloat16):
        for case, differences in found.items():
            assert all(d < 1.5e-2 for d in differences), f"{case}: out, dq, dk, dv {differences}"


def compiled_differences(rank: int, method: str) -> list[float]:
    cut, group = SequenceCut(rank, 2, method != "ulysses"), dist.group.WORLD
    assert group is not None
    make_core, make_meta = METHODS[method]
    core = make_core(Layer().core(5), cut, group)
    meta, case = make_meta(whole_meta(), cut, group), Case(core)
    expected = attention(core, meta, case, cut, True)
    core.compile(fullgraph=True, backend="aot_eager")
    found = attention(core, meta, case, cut, True)
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_under_compile(method: str) -> None:
    for differences in fork_ranks(compiled_differences, 2, method):
        assert all(d < 1e-6 for d in differences), differences


@pytest.mark.parametrize("headtail", [True, False])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_every_token_is_cut_once_and_in_its_order(degree: int, headtail: bool) -> None:
    batch = {"tokens_BT": torch.arange(32).reshape(2, 16), "x_BTD": torch.arange(64).reshape(2, 16, 2)}
    cuts = [SequenceCut(rank, degree, headtail and degree > 1) for rank in range(degree)]
    parts = [cut.cut(batch) for cut in cuts]
    for row in range(2):
        tokens = torch.cat([part["tokens_BT"][row] for part in parts])
        assert tokens.sort().values.tolist() == batch["tokens_BT"][row].tolist()
    for cut, part in zip(cuts, parts, strict=True):
        assert torch.equal(part["x_BTD"][..., 0], 2 * part["tokens_BT"])
        assert part["tokens_BT"][0].tolist() == cut.places(16 // degree, torch.device("cpu")).tolist()


def test_head_and_tail_by_hand() -> None:
    batch = {"tokens_BT": torch.arange(8)[None]}
    assert SequenceCut(0, 2, True).cut(batch)["tokens_BT"].tolist() == [[0, 1, 6, 7]]
    assert SequenceCut(1, 2, True).cut(batch)["tokens_BT"].tolist() == [[2, 3, 4, 5]]
    assert SequenceCut(1, 2, False).cut(batch)["tokens_BT"].tolist() == [[4, 5, 6, 7]]


def visible_pairs(degree: int, headtail: bool) -> list[int]:
    cpu = torch.device("cpu")
    places = [SequenceCut(rank, degree, headtail).places(TOKENS // degree, cpu) for rank in range(degree)]
    return [int(visible_between(p, torch.arange(TOKENS), None, None, None).sum()) for p in places]


def scored_pairs(degree: int, headtail: bool) -> list[int]:
    """Products of a query and a key that each rank of a ring computes."""
    cuts = [SequenceCut(rank, degree, headtail) for rank in range(degree)]
    return [
        sum(
            (tile.queries.stop - tile.queries.start) * (tile.keys.stop - tile.keys.start)
            for owner in range(degree)
            for tile in context_tiles.tiles(cut, owner, TOKENS // degree, None)
        )
        for cut in cuts
    ]


@pytest.mark.parametrize("degree", [2, 4])
def test_head_and_tail_make_causal_work_even(degree: int) -> None:
    even = TOKENS * (TOKENS + 1) // 2 // degree
    assert visible_pairs(degree, True) == [even] * degree
    assert len(set(scored_pairs(degree, True))) == 1
    uneven = visible_pairs(degree, False)
    assert uneven == sorted(set(uneven))
    assert scored_pairs(degree, False) == sorted(set(scored_pairs(degree, False)))


def previous_on_rank(rank: int, world: int, headtail: bool) -> list[Tensor]:
    cut, group, case = SequenceCut(rank, world, headtail), dist.group.WORLD, Case(Layer().core(None))
    assert group is not None
    x = cut.mine(case.q[:, :, 0]).clone().requires_grad_()
    out = PreviousAcrossCut(cut, group)(x, cut.mine(case.positions))
    (grad,) = torch.autograd.grad(out, x, cut.mine(case.dout[:, :, 0]))
    return [whole_row(value.detach(), cut, group) for value in (out, grad)]


@pytest.mark.parametrize("headtail", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_previous_token_across_the_cut(world: int, headtail: bool) -> None:
    case = Case(Layer().core(None))
    x = case.q[:, :, 0].clone().requires_grad_()
    expected = PreviousToken()(x, case.positions)
    (grad,) = torch.autograd.grad(expected, x, case.dout[:, :, 0])
    for found in fork_ranks(previous_on_rank, world, world, headtail):
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], grad)


def wrong(heads: int, kv_heads: int, **parallelism: Any) -> list[str]:
    mixer = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    overrides = {"num_hidden_layers": 2, "blocks": {"full": {"mixer": mixer}}}
    spec = resolve_model(Model(name="qwen3", flavor="debug", overrides=overrides), 64)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    return mistakes(model, Job(parallelism=Parallelism(**parallelism)))


def test_ulysses_wants_heads_for_every_rank() -> None:
    job = {"context_parallel_degree": 4, "context_parallel_method": "ulysses"}
    assert wrong(8, 2, **job) == []
    assert wrong(6, 2, **(job | {"context_parallel_method": "ring"})) == []
    assert wrong(6, 2, **job) == [
        "parallelism.context_parallel_degree = 4: ulysses shares out attention heads, and 4 does not divide a rank's "
        "6; use 3, or context_parallel_method = 'allgather' or 'ring'"
    ]
    assert wrong(8, 2, **job, tensor_parallel_degree=4) == [
        "parallelism.context_parallel_degree = 4: ulysses shares out attention heads, and 4 does not divide a rank's "
        "2 (8 over tensor_parallel_degree = 4); use 2, or context_parallel_method = 'allgather' or 'ring'"
    ]
    assert wrong(4, 2, **job, tensor_parallel_degree=4) == [
        "parallelism.context_parallel_degree = 4: ulysses shares out attention heads, and 4 does not divide a rank's "
        "1 (4 over tensor_parallel_degree = 4); use context_parallel_method = 'allgather' or 'ring'"
    ]


def test_what_would_not_see_other_ranks_is_refused() -> None:
    spec = resolve_model(Model(name="qwen3", flavor="debug", overrides={"num_hidden_layers": 1}), 64)
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    parallelism = Parallelism(context_parallel_degree=2, context_parallel_method="ring")
    mixer: Any = model.layers["0"].mixer
    mixer.core.scores = Scores(kernel="flex")
    assert mistakes(model, Job(parallelism=parallelism)) == [
        "model: kernel = 'flex' is not used by parallelism.context_parallel_method = 'ring', which multiplies for "
        "itself; leave the kernel 'auto'"
    ]
    mixer.core = torch.nn.Identity()
    assert mistakes(model, Job(parallelism=parallelism)) == [
        "parallelism.context_parallel_degree = 2: layer 0 mixes tokens without an attention core, and would see this "
        "rank's tokens only; set it to 1"
    ]
