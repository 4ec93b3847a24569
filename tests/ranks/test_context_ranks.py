"""Context parallelism, alone and with others, against one rank."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from meshes import assert_same, job_of
from torch import Tensor, nn

from nanovl.build import build_model
from nanovl.config.schema import Compile, Job, Parallelism, Tokenizer
from nanovl.device import Modes
from nanovl.dist import fork_ranks
from nanovl.eval.bpb import bits_per_byte
from nanovl.inference.uncached import generate_uncached
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.models.blocks.attention import MetaBuilder
from nanovl.models.blocks.head import Head
from nanovl.parallelisms.context import apply_context_parallel, sequence_cut
from nanovl.parallelisms.fsdp import apply_fsdp
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.registry import resolve_model
from nanovl.spec import IGNORE_INDEX, Batch, Inputs, Stream
from nanovl.spec import Model as AnyModel
from nanovl.step import sum_over_ranks, train_step
from nanovl.tokenizer.bpe import load_tokenizer
from nanovl.verify import made_up_rows, shake

CPU = torch.device("cpu")
cp = partial(dict, context_parallel_degree=2)
MESHES = [
    (2, cp()),
    (2, cp(context_parallel_method="ring")),
    (2, cp(context_parallel_method="ulysses")),
    (4, cp(context_parallel_degree=4)),
]
MORE_MESHES = [
    (2, cp(context_parallel_load_balancer="none")),
    (2, cp(context_parallel_method="ring", context_parallel_load_balancer="none")),
    (4, cp(context_parallel_degree=4, context_parallel_method="ring")),
    (4, cp(context_parallel_degree=4, context_parallel_method="ulysses")),
    (4, cp()),
    (4, cp(data_parallel_replicate_degree=2)),
    (4, cp(data_parallel_replicate_degree=2, context_parallel_method="ring")),
    (4, cp(tensor_parallel_degree=2, context_parallel_method="ring")),
    (4, cp(tensor_parallel_degree=2, context_parallel_method="ulysses")),
    (8, cp(tensor_parallel_degree=2)),
    (8, cp(tensor_parallel_degree=2, data_parallel_replicate_degree=2)),
]
TENSOR = (4, cp(tensor_parallel_degree=2))


def name(mesh: Any) -> str:
    if not isinstance(mesh, dict):
        return f"{mesh} ranks" if isinstance(mesh, int) else mesh
    return " ".join(
        f"{key.replace('_parallel', '').replace('_degree', '')}={value}" for key, value in mesh.items()
    )


@pytest.mark.parametrize(("world", "fields"), [*MESHES, TENSOR], ids=name)
def test_qwen3_same_as_one_rank(world: int, fields: dict[str, Any]) -> None:
    assert_same(job_of("qwen3", local=4, **fields), "qwen3", world)


@pytest.mark.parametrize(("world", "fields"), MESHES, ids=name)
def test_nanochat_same_as_one_rank(world: int, fields: dict[str, Any]) -> None:
    assert_same(job_of("nanochat", local=4, **fields), "nanochat", world)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fields"), MORE_MESHES, ids=name)
def test_qwen3_same_as_one_rank_on_more_meshes(world: int, fields: dict[str, Any]) -> None:
    local = 4 if world < 8 else 2
    assert_same(job_of("qwen3", local=local, **fields), "qwen3", world)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fields"), [TENSOR, *MORE_MESHES[:-2]], ids=name)
def test_nanochat_same_as_one_rank_on_more_meshes(world: int, fields: dict[str, Any]) -> None:
    assert_same(job_of("nanochat", local=4, **fields), "nanochat", world)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["allgather", "ring", "ulysses"])
def test_compiled_and_recomputed_blocks_train_the_same(method: str) -> None:
    job = job_of("qwen3", local=8, **cp(context_parallel_method=method))
    job = replace(
        job,
        compile=Compile(enable="on", backend="aot_eager"),
        activation_checkpoint=replace(job.activation_checkpoint, mode="selective"),
    )
    assert_same(job, "qwen3", 2)


class Ones(AnyModel):
    """Every token's state is 1 and every logit of a zero head 0, so each gradient is a fraction worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.meta = MetaBuilder(())
        self.lm_head = Head(1, 2)
        nn.init.zeros_(self.lm_head.weight)
        self.first_children, self.last_children = [], ["lm_head"]

    def begin(self, inputs: Inputs) -> Stream:
        return (torch.ones(*inputs.tokens_BT.shape, 1),)

    def end(self, stream: Stream) -> Tensor:
        return stream[0]

    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        full.zero_()

    def forward_flops_per_token(self, mean_keys: Any) -> float:
        return 0.0


def hand_worked(rank: int, world: int, fields: dict[str, Any]) -> tuple[float, list[float]]:
    """Loss and gradient of two rows whose targets lie unevenly over the ranks."""
    job = Job(parallelism=Parallelism(**fields))
    mesh = build_mesh(job.parallelism, world, CPU)
    model = Ones()
    apply_context_parallel(model, job.parallelism, mesh)
    apply_fsdp(model, job, mesh, torch.float32)
    parallel = ParallelModel([model], mesh, sequence_cut(job.parallelism, mesh))
    none = IGNORE_INDEX
    targets_BT = torch.tensor(
        [[0, 0, 0, 1, none, none, none, 1], [none, none, 0, none, none, none, none, none]]
    )
    weights_BT = torch.ones(2, 8)
    weights_BT[1] = 2.0
    zeros_BT = torch.zeros_like(targets_BT)
    batch = {
        "tokens_BT": zeros_BT,
        "targets_BT": targets_BT,
        "positions_BT": torch.arange(8).expand(2, 8),
        "doc_ids_BT": zeros_BT,
        "weights_BT": weights_BT,
    }
    mine: Batch = {key: value[mesh.data_rank :: mesh.data_degree] for key, value in batch.items()}
    result = train_step(parallel, [mine], max_norm=100.0, chunk_tokens=16)
    (grad,) = (p.grad for _, p in parallel.named_parameters())
    assert grad is not None
    return result.loss, grad.full_tensor().flatten().tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("world", "fields"),
    [
        (1, {}),
        (2, {}),
        (2, {"data_parallel_replicate_degree": 2}),  # torchtitan 0.2.2 divides by the copies here
        (2, cp()),
        (4, cp()),
        (4, cp(data_parallel_replicate_degree=2)),
    ],
    ids=name,
)
def test_loss_and_gradient_are_divided_by_the_weights_of_whole_rows(
    world: int, fields: dict[str, Any]
) -> None:
    """Weights 5 x 1 + 1 x 2 = 7, of which target 0 has 3 + 2 = 5 and target 1 has 2. Each probability is 1/2, so
    d/dw_0 = (7/2 - 5) / 7 and d/dw_1 = (7/2 - 2) / 7; the loss is ln 2."""
    for loss, grad in fork_ranks(hand_worked, world, world, fields):
        assert loss == pytest.approx(log(2))
        assert grad == pytest.approx([-3 / 14, 3 / 14])


PROMPTS = ["def", "import os\n"]


def evaluated(rank: int, world: int, job: Job, tokenizer_folder: Path) -> tuple[float, int, list[list[int]]]:
    """Bits per byte and bytes of made-up rows, and the tokens of two samples."""
    mesh = build_mesh(job.parallelism, world, CPU)
    tokenizer = load_tokenizer(tokenizer_folder)
    spec = resolve_model(job.model, tokenizer.vocab_size)
    model = build_model(job, spec, mesh, Modes(torch.float32, False), CPU, Log(1), fresh=True)
    shake(model, 3)
    mine = range(mesh.data_rank, 4, mesh.data_degree)
    batches = [made_up_rows(job, tokenizer.vocab_size, 0, [row]) for row in mine]
    found = bits_per_byte(
        model.evaluate,
        batches,
        torch.from_numpy(tokenizer.token_bytes()).long(),
        CPU,
        total=lambda sums: sum_over_ranks(mesh, *sums),
        chunk_tokens=16,
    )
    samples = generate_uncached(model, tokenizer, PROMPTS, max_tokens=4, temperature=1.0, top_k=0, seed=5)
    return found.bpb, found.bytes, [sample.ids for sample in samples]


@cache
def evaluated_on_one_rank(model: str, tokenizer_folder: Path) -> Any:
    return fork_ranks(evaluated, 1, 1, evaluation_job(model, tokenizer_folder), tokenizer_folder)[0]


def evaluation_job(model: str, tokenizer_folder: Path) -> Job:
    vocab_size = load_tokenizer(tokenizer_folder).vocab_size
    return replace(job_of(model), tokenizer=Tokenizer(vocab_size=vocab_size))


@pytest.mark.parametrize(
    ("model", "world", "fields"),
    [
        ("qwen3", *MESHES[0]),
        ("nanochat", *MESHES[1]),
        *(pytest.param("qwen3", *mesh, marks=pytest.mark.slow) for mesh in (*MESHES[1:3], (4, cp()))),
        *(
            pytest.param("nanochat", *mesh, marks=pytest.mark.slow)
            for mesh in (MESHES[0], *MESHES[2:], TENSOR)
        ),
    ],
    ids=name,
)
def test_validation_and_samples_are_those_of_one_rank(
    model: str, world: int, fields: dict[str, Any], tokenizer_folder: Path
) -> None:
    bpb, num_bytes, ids = evaluated_on_one_rank(model, tokenizer_folder)
    assert num_bytes > 0
    assert len(ids) == len(PROMPTS)
    job = evaluation_job(model, tokenizer_folder)
    job = replace(job, parallelism=Parallelism(**fields))
    for found in fork_ranks(evaluated, world, world, job, tokenizer_folder):
        assert found[0] == pytest.approx(bpb, rel=1e-6)
        assert found[1:] == (num_bytes, ids)
