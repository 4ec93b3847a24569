"""Tensor parallelism piece by piece: collectives against their transposes, cut modules against whole ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from nanovl.config.schema import Compile, Job, Model, Parallelism
from nanovl.device import Modes
from nanovl.dist import all_reduce as reduce_in_place
from nanovl.dist import fork_ranks
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.models.blocks.head import Head
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.parallelisms.apply import parallelize
from nanovl.parallelisms.collectives import all_reduce, gather, gather_for_all_alike, piece, reduce_scatter
from nanovl.parallelisms.local_views import View, read_before, spread, sum_copies
from nanovl.parallelisms.tensor import mistakes
from nanovl.parallelisms.tensor_modules import RowLinear, VocabEmbedding, VocabHead, WidthNorm
from nanovl.registry import resolve_model

CPU = torch.device("cpu")
RANKS = 2
COLLECTIVES: dict[str, Callable[[Tensor, dist.ProcessGroup], Tensor]] = {
    "gather 0": lambda x, group: gather(x, 0, group),
    "gather 1": lambda x, group: gather(x, 1, group),
    "reduce_scatter 0": lambda x, group: reduce_scatter(x, 0, group),
    "reduce_scatter 1": lambda x, group: reduce_scatter(x, 1, group),
    "all_reduce": all_reduce,
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dots(rank: int, name: str) -> tuple[float, float]:
    """<f(x), y> and <x, f'(y)>, each summed over the ranks."""
    x = randn(4, 6, seed=rank).requires_grad_()
    found = COLLECTIVES[name](x, dist.group.WORLD)
    y = randn(*found.shape, seed=10 + rank)
    found.backward(y)
    both = torch.stack(((found * y).sum().detach(), (x * x.grad).sum().detach()))
    return tuple(reduce_in_place(both).tolist())  # type: ignore[return-value]


@pytest.mark.parametrize("name", COLLECTIVES)
def test_backward_is_the_transpose_of_forward(name: str) -> None:
    forward, backward = fork_ranks(dots, RANKS, name)[0]
    assert forward == pytest.approx(backward, rel=1e-12)


def by_hand(rank: int) -> dict[str, list[Any]]:
    group = dist.group.WORLD
    x = torch.tensor([[1.0 + rank, 3.0 + rank]], requires_grad=True)
    found: dict[str, list[Any]] = {}
    for name, result, upstream in (
        ("gather", gather(x, 1, group), [[1.0, 2.0, 3.0, 4.0]]),
        ("reduce_scatter", reduce_scatter(x, 1, group), [[5.0 + rank]]),
        ("all_reduce", all_reduce(x, group), [[1.0 + rank, 2.0]]),
        ("alike", gather_for_all_alike(x, 1, group), [[1.0, 2.0, 3.0, 4.0]]),
        ("piece", piece(x, 1, group), [[7.0 + rank]]),
    ):
        (gradient,) = torch.autograd.grad(result, x, torch.tensor(upstream))
        found[name] = [result.tolist(), gradient.tolist()]
    return found


def test_collectives_by_hand() -> None:
    # rank 0 has [1, 3], rank 1 has [2, 4]; both send the gradient 1, 2, 3, 4 into the gathers
    first, second = fork_ranks(by_hand, RANKS)
    assert first["gather"] == [[[1.0, 3.0, 2.0, 4.0]], [[2.0, 4.0]]]
    assert second["gather"] == [[[1.0, 3.0, 2.0, 4.0]], [[6.0, 8.0]]]
    assert first["reduce_scatter"] == [[[3.0]], [[5.0, 6.0]]]
    assert second["reduce_scatter"] == [[[7.0]], [[5.0, 6.0]]]
    assert first["all_reduce"] == [[[3.0, 7.0]], [[3.0, 4.0]]]
    assert first["alike"] == [[[1.0, 3.0, 2.0, 4.0]], [[1.0, 2.0]]]
    assert second["alike"] == [[[1.0, 3.0, 2.0, 4.0]], [[3.0, 4.0]]]
    assert first["piece"] == [[[1.0]], [[7.0, 0.0]]]
    assert second["piece"] == [[[4.0]], [[0.0, 8.0]]]


def test_a_length_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(Exception, match=r"dimension 1 of \(4, 3\) over 2 ranks"):
        fork_ranks(odd_length, RANKS)


def odd_length(rank: int) -> None:
    reduce_scatter(torch.zeros(4, 3), 1, dist.group.WORLD)


class Toy(nn.Module):
    """One token a rank, times a scale that is whole; then all tokens times a weight of which each rank has its entry,
    or one entry for both ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.column = nn.Parameter(torch.tensor([1.0, 10.0]))
        self.shared = nn.Parameter(torch.tensor([[100.0]]))

    def forward(self, x_T: Tensor) -> Tensor:
        all_T = gather(self.scale * x_T, 0, dist.group.WORLD)
        return (all_T * self.column).sum() + (all_T * self.shared[0]).sum()


def toy_gradients(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("fsdp", "tp"))
    toy = Toy()
    cuts = {"column": View(shard_dim=0), "shared": View(dim=0, piece=0, pieces=1)}
    read_before(toy, [(toy, spread(toy, cuts, mesh["tp"], {}))])
    fully_shard(toy, mesh=mesh["fsdp"])
    toy(torch.tensor([3.0 + 2 * rank])).backward()
    sum_copies(toy.parameters(), "tp", mesh.get_group("tp"))
    return {name: whole_gradient(p) for name, p in toy.named_parameters()}


def whole_gradient(parameter: nn.Parameter) -> list[float]:
    gradient = parameter.grad
    assert isinstance(gradient, DTensor)
    assert not any(placement.is_partial() for placement in gradient.placements)
    return gradient.full_tensor().flatten().tolist()


def test_gradients_of_whole_and_cut_parameters_by_hand() -> None:
    # tokens 3 and 5, scale s = 2, entries c = 1 and 10, shared d = 100 that both ranks use:
    # the sum of the ranks' results is s (3 + 5) (c_0 + c_1 + 2 d) = 8 s (11 + 200)
    # d/ds = 8 * 211 = 1688, neither halved nor doubled;  d/dc = 8 s = 16 each;  d/dd = 2 * 8 s = 32
    for found in fork_ranks(toy_gradients, RANKS):
        assert found == {"scale": [1688.0], "column": [16.0, 16.0], "shared": [32.0]}


def over(cls: type[nn.Module], module: nn.Module, **attributes: Any) -> Any:
    """`module` as the class that asks other ranks."""
    module.__class__ = cls
    for name, value in {"tp": dist.group.WORLD, **attributes}.items():
        setattr(module, name, value)
    return module


def mine(full: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(full.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone())


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def cut_modules(rank: int) -> None:
    """Each cut module on its part against the whole one; upstream gradients belong to the ranks' own results."""
    group = dist.group.WORLD
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2))

    row = nn.Linear(8, 8)
    for parameter in row.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    cut_row = over(RowLinear, nn.Linear(4, 8))
    cut_row.weight, cut_row.bias = mine(row.weight.detach(), 1), nn.Parameter(row.bias.detach())
    row(x).backward(upstream)
    out = cut_row(mine(x, 2))
    close(out, mine(row(x), 1))
    out.backward(mine(upstream, 1))
    close(cut_row.weight.grad, mine(row.weight.grad, 1).data)
    close(reduce_in_place(cut_row.bias.grad), row.bias.grad)

    tokens = torch.randint(0, 6, (3, 4), generator=torch.Generator().manual_seed(4))
    table = nn.Embedding(6, 8)
    nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(5))
    table(tokens).backward(upstream)
    for cuts_sequence in (True, False):
        cut = over(VocabEmbedding, nn.Embedding(3, 8), cuts_sequence=cuts_sequence)
        cut.weight = mine(table.weight.detach(), 0)
        expected, given = (
            (mine(table(tokens), 1), mine(upstream, 1)) if cuts_sequence else (table(tokens), upstream)
        )
        out = cut(tokens)
        close(out, expected)
        out.backward(given if cuts_sequence or rank == 0 else torch.zeros_like(given))
        close(cut.weight.grad, mine(table.weight.grad, 0).data)

    for kind in ("ones", "zeros", "none"):
        norm = RMSNorm(8, NormConfig(weight=kind))
        cut_norm = over(WidthNorm, RMSNorm(4, NormConfig(weight=kind)))
        if norm.weight is not None:
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(6))
            cut_norm.weight = mine(norm.weight.detach(), 0)
        whole = x.clone().requires_grad_()
        norm(whole).backward(upstream)
        part = mine(x, 2)
        out = cut_norm(part)
        close(out, mine(norm(x), 2))
        out.backward(mine(upstream, 2))
        close(part.grad, mine(whole.grad, 2).data)
        if norm.weight is not None:
            close(cut_norm.weight.grad, mine(norm.weight.grad, 0).data)
    assert group is not None


def test_cut_modules_are_parts_of_whole_ones() -> None:
    fork_ranks(cut_modules, RANKS)


def head_losses(rank: int, vocab: int, padded: int, softcap: float | None) -> None:
    """Against torch's cross entropy of the whole head, gradients by hidden states and weights included."""
    ranks = dist.get_world_size()
    weight = torch.randn(padded, 8, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    targets = torch.randint(0, vocab, (2, 6), generator=torch.Generator().manual_seed(3))
    targets[0, :2] = -100
    weights = torch.rand(2, 6, generator=torch.Generator().manual_seed(4))

    whole = nn.Parameter(weight.clone())
    logits = x @ whole[:vocab].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    loss = 3.0 * (nll * weights.flatten()).sum()
    loss.backward()
    dx, x.grad = x.grad, None

    head = over(VocabHead, Head(8, vocab, padded, softcap))
    head.weight = mine(weight, 0)
    found, found_nll = head.cross_entropy(x, targets, weights, chunk_tokens=5)
    close(3.0 * found, loss)
    close(found_nll.flatten(), nll)
    (3.0 * found).backward()
    close(reduce_in_place(x.grad), dx)  # each rank has its share
    close(head.weight.grad, whole.grad.chunk(ranks)[rank])

    x.grad, head.weight.grad = None, None
    with torch.no_grad():
        close(head.cross_entropy(x, targets, weights, chunk_tokens=64)[0] * 3.0, loss)
    full = head(x)
    close(full, logits)
    again = F.cross_entropy(full.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    (3.0 * (again * weights.flatten()).sum()).backward()  # on every rank alike
    close(reduce_in_place(x.grad), dx)
    close(head.weight.grad, whole.grad.chunk(ranks)[rank])
    close(head(x[:, -1]), logits[:, -1])


@pytest.mark.parametrize(
    ("ranks", "vocab", "padded", "softcap"),
    [(2, 10, 10, None), (2, 10, 12, 1.5), (4, 10, 16, None), (4, 9, 16, 2.0)],
    ids=["even", "padded and capped", "a rank of padding", "a rank of padding, capped"],
)
def test_loss_over_a_cut_vocabulary(ranks: int, vocab: int, padded: int, softcap: float | None) -> None:
    fork_ranks(head_losses, ranks, vocab, padded, softcap)


def job(flavor: str = "debug", name: str = "qwen3", **fields: Any) -> Job:
    made = Job(model=Model(name=name, flavor=flavor), parallelism=Parallelism(**fields))
    made.training.seq_len = 32
    return made


def meta_model(job: Job, vocab_size: int = 96) -> Any:
    spec = resolve_model(job.model, vocab_size)
    with torch.device("meta"):
        return spec.family.model(spec.config)


def mistakes_of(job: Job, device: torch.device = CPU) -> list[str]:
    return mistakes(meta_model(job), job, device)


def test_a_model_that_fits_is_let_through() -> None:
    for degree in (1, 2, 4, 8):  # of 4 key heads, 8 ranks have one for each two
        assert mistakes_of(job(tensor_parallel_degree=degree)) == []


def test_every_part_that_does_not_fit_is_named_once_for_all_layers() -> None:
    found = mistakes_of(job(tensor_parallel_degree=3))
    prefix = "parallelism.tensor_parallel_degree = 3: "
    assert found == [
        f"{prefix}layers.*.mixer.q_proj, layers.*.mixer.o_proj: 8 parts cannot be shared by 3 ranks; use 2 or 4",
        f"{prefix}layers.*.mixer.k_proj, layers.*.mixer.v_proj: 4 parts cannot be shared by 3 ranks; use 2 or 4",
        f"{prefix}layers.*.ffn.up_proj, layers.*.ffn.down_proj, layers.*.ffn.gate_proj: "
        "128 parts cannot be shared by 3 ranks; use 2 or 4",
    ]
    more_ranks_than_heads = mistakes_of(job(tensor_parallel_degree=16))
    assert len(more_ranks_than_heads) == 1
    assert "o_proj: 8 parts" in more_ranks_than_heads[0]


def test_a_vocabulary_that_does_not_fit_may_be_padded() -> None:
    assert mistakes(meta_model(job(), 97), job(tensor_parallel_degree=2), CPU) == [
        "parallelism.tensor_parallel_degree = 2: embed_tokens, lm_head: 97 parts cannot be shared by 2 ranks; "
        "use 1, or make the vocabulary a multiple of 2"
    ]


def test_transfers_cannot_be_overlapped_without_a_compiler_or_a_gpu() -> None:
    wanted = job(tensor_parallel_degree=2, enable_async_tensor_parallel=True)
    prefix = "parallelism.enable_async_tensor_parallel = true: "
    (no_gpu,) = mistakes_of(wanted)
    assert no_gpu == f"{prefix}it needs memory that GPUs share, and this is a CPU, or leave it out"
    (no_compiler,) = mistakes_of(replace(wanted, compile=Compile(enable="off")), torch.device("cuda"))
    assert (
        no_compiler == f"{prefix}the compiler does the overlapping; set compile.enable = on, or leave it out"
    )
    assert mistakes_of(wanted, torch.device("cuda")) == []
    (nothing,) = mistakes_of(job(enable_async_tensor_parallel=True), torch.device("cuda"))
    assert "there are no transfers with tensor_parallel_degree = 1" in nothing


def switches_for_overlap(rank: int) -> bool:
    import torch._inductor.config

    from nanovl.parallelisms.tensor import apply_tensor_parallel

    wanted = job(tensor_parallel_degree=2, enable_async_tensor_parallel=True)
    apply_tensor_parallel(meta_model(wanted), wanted.parallelism, build_mesh(wanted.parallelism, 2, CPU))
    return torch._inductor.config._micro_pipeline_tp


def test_overlapping_is_switched_on() -> None:
    assert fork_ranks(switches_for_overlap, 2) == [True, True]


def parameters_of(rank: int, model: Model) -> dict[str, tuple[Any, ...]]:
    wanted = replace(job(tensor_parallel_degree=4), model=model)
    made = meta_model(wanted)
    parallelize(made, wanted, build_mesh(wanted.parallelism, 4, CPU), Modes(torch.float32, False), Log(1))
    assert (
        made.layers["0"].mixer.q_proj.weight is dict(made.named_parameters())["layers.0.mixer.q_proj.weight"]
    )
    return {name: (p.shape, p.placements[-1], p.to_local().shape) for name, p in made.named_parameters()}


def test_names_and_whole_shapes_stay_and_tied_weights_stay_one() -> None:
    mixer = {"num_key_value_heads": 2, "qk_norm": "full"}
    overrides = {"num_hidden_layers": 1, "tie_word_embeddings": True, "blocks": {"full": {"mixer": mixer}}}
    model = Model(name="qwen3", flavor="debug", overrides=overrides)
    found = fork_ranks(parameters_of, 4, model)[0]
    spec = resolve_model(model, 96)
    assert {name: shape for name, (shape, *_) in found.items()} == {
        name: p.shape for name, p in spec.family.model(spec.config).named_parameters()
    }
    assert "lm_head.weight" not in found
    layer = "layers.0.mixer"
    assert found["embed_tokens.weight"][1:] == (Shard(0), (24, 64))
    assert found[f"{layer}.q_proj.weight"][1:] == (Shard(0), (32, 64))
    assert found[f"{layer}.k_proj.weight"][1:] == (Replicate(), (32, 64))  # two heads for four ranks
    assert found[f"{layer}.o_proj.weight"][1:] == (Shard(1), (64, 32))
    assert found[f"{layer}.q_norm.weight"][1:] == (Shard(0), (32,))
    assert found[f"{layer}.k_norm.weight"][1:] == (Replicate(), (32,))
    assert found["norm.weight"][1:] == (Replicate(), (64,))
