"""What `nanovl plan` says of a job against the same job run: bytes held, bytes sent, bytes kept for backward."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshes import VOCAB, job_of
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovl.build import build_model, build_optimizers
from nanovl.config.schema import Job
from nanovl.device import Modes
from nanovl.dist import fork_ranks
from nanovl.log import Log
from nanovl.mesh import build_mesh
from nanovl.optim.expert_balance import ExpertBalance
from nanovl.optim.scaling import SizeRules
from nanovl.parallelisms import expert
from nanovl.planning.groups import AXES
from nanovl.planning.rank import RankPlan, plan_rank
from nanovl.planning.stages import PlannedJob
from nanovl.registry import resolve_model
from nanovl.step import train_step
from nanovl.verify import made_up_rows

CPU = torch.device("cpu")
FLOAT32 = Modes(torch.float32, False)
RULES = SizeRules(0, 0, 1, 1.0, 1.0, 1.0)
CHUNK = 16
KINDS = {
    "allgather": "all-gather", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce", "all_reduce": "all-reduce", "alltoall": "all-to-all", "all_to_all": "all-to-all",
    "send": "send", "recv_": "receive",
}  # fmt: skip


@dataclass
class Measured:
    """What one rank really held and sent in one step."""

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    """Most that autograd keeps at a time, parameters apart."""
    alive: int
    """Most memory of all tensors at a time, without optimizer state."""
    sent: Counter[tuple[str, str]]
    """Bytes by process group and collective."""
    groups: dict[str, str]
    """Process group by mesh axis."""


class Saved:
    """Memory that autograd keeps alive."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self.bytes = self.most = 0


class Kept:
    """A tensor that is saved for backward."""

    def __init__(self, tensor: torch.Tensor, book: Saved) -> None:
        self.tensor, self.book = tensor, book
        storage = tensor.untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()
        book.bytes += 0 if book.users[self.place] else self.size
        book.users[self.place] += 1
        book.most = max(book.most, book.bytes)

    def __del__(self) -> None:
        self.book.users[self.place] -= 1
        self.book.bytes -= 0 if self.book.users[self.place] else self.size


class Alive(TorchDispatchMode):
    """Most memory of all tensors that operations see; looked at after each, since FSDP resizes memory in between."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if func.namespace == "nanovl":  # look into an operator of our own, such as ring attention
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_of((args, out)):
            storage = tensor.untyped_storage()
            self.storages.setdefault(storage._cdata, weakref.ref(storage))
        alive = {key: storage for key, ref in self.storages.items() if (storage := ref()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        self.most = max(self.most, sum(storage.nbytes() for storage in alive.values()))
        return out


class Sent(TorchDispatchMode):
    """Bytes by process group and collective, each counted as its largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        kind = next((k for name, k in KINDS.items() if name in str(func)), None)
        if str(func).startswith("c10d.") and kind is not None:
            boxed = [
                a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
            ]
            self.bytes[dist.ProcessGroup.unbox(boxed[0]).group_name, kind] += max(map(size_of, args))
        elif str(func).startswith("_c10d_functional.") and kind is not None:
            self.bytes[args[-1], kind] += max(map(size_of, (*args, out)))
        return out


@contextmanager
def peer_to_peer(into: Counter[tuple[str, str]]) -> Iterator[None]:
    """Count what `batch_isend_irecv` is given: inside of an operator of our own no dispatch mode sees it."""
    original = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            kind = "send" if operation.op is dist.isend else "receive"
            group = operation.group or dist.group.WORLD
            into[group.group_name, kind] += size_of(operation.tensor)
        return original(operations)

    dist.batch_isend_irecv = counting
    try:
        yield
    finally:
        dist.batch_isend_irecv = original


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def size_of(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind `tensors`, shared memory once."""
    locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in locals_)}.values())


def measured_on_rank(rank: int, job: Job, world: int) -> Measured:
    expert._disable_current_modes = nullcontext  # experts gather their weights out of sight
    mesh = build_mesh(job.parallelism, world, CPU)
    spec = resolve_model(job.model, VOCAB)
    model = build_model(job, spec, mesh, FLOAT32, CPU, Log(-1), fresh=True)
    optimizers = build_optimizers(job, spec, model, RULES, FLOAT32, Log(-1))
    balance = ExpertBalance(model.whole, mesh)
    balance.begin_step(job.training.global_batch_size * job.training.seq_len)
    mine = range(mesh.data_rank, job.training.global_batch_size, mesh.data_degree)
    at_once = job.training.local_batch_size
    batches = [made_up_rows(job, VOCAB, 0, mine[i : i + at_once]) for i in range(0, len(mine), at_once)]
    with Sent() as sent, peer_to_peer(sent.bytes):
        train_step(model, batches, max_norm=0.5, chunk_tokens=CHUNK)
        balance.end_step(update=True)
        optimizers.step()
    parameters = [p for _, p in model.named_parameters()]
    states = [v for o in optimizers.optimizers for state in o.state.values() for v in state.values()]
    gradients = storage_bytes(p.grad for p in parameters if p.grad is not None)
    saved = Saved()

    def keep(tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in storages_of(model.parts):
            return tensor
        return Kept(tensor, saved)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: getattr(kept, "tensor", kept)):
        train_step(model, batches, max_norm=0.5, chunk_tokens=CHUNK)
    optimizers.zero_grad()
    with Alive() as alive:
        for parameter in parameters:
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        train_step(model, batches, max_norm=0.5, chunk_tokens=CHUNK)
    groups = {axis: group.group_name for axis in AXES if (group := mesh.group(axis)) is not None}
    groups["world"] = dist.group.WORLD.group_name
    for name, _ in sent.bytes:
        if name not in groups.values():
            group = dist.distributed_c10d._resolve_process_group(name)
            groups[f"{group.size()} ranks"] = name
    return Measured(
        storage_bytes(parameters),
        gradients,
        storage_bytes(states),
        saved.most,
        alive.most,
        sent.bytes,
        groups,
    )


def storages_of(parts: Iterable[nn.Module]) -> set[int]:
    """Memory of the weights as they are now, gathered or not."""
    weights = [p for part in parts for p in part.parameters()]
    return {(p.to_local() if isinstance(p, DTensor) else p).untyped_storage().data_ptr() for p in weights}


def completed(job: Job) -> Job:
    """With its family's parameter groups, and one step."""
    spec = resolve_model(job.model, VOCAB)
    groups = job.optimizer.groups or spec.family.optimizer_groups(spec.config)
    return replace(
        job, optimizer=replace(job.optimizer, groups=groups), training=replace(job.training, steps=1)
    )


def planned(job: Job, world: int) -> RankPlan:
    return plan_rank(PlannedJob(job, resolve_model(job.model, VOCAB), RULES, FLOAT32, world, CHUNK), 0)


def test_a_rank_is_planned_alike_whichever_came_before() -> None:
    """One process is all ranks in turn, of worlds whose meshes are equal to torch."""
    degrees = {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2}
    jobs = [completed(job_of(name, rows=16, **degrees)) for name in ("qwen3", "moe")]
    asked = [PlannedJob(job, resolve_model(job.model, VOCAB), RULES, FLOAT32, 8, CHUNK) for job in jobs]
    forth = [plan_rank(a, rank) for a in asked for rank in (0, 4)]
    back = [plan_rank(a, rank) for a in reversed(asked) for rank in (4, 0)]
    assert forth == back[::-1]
    assert forth[0].layers != forth[1].layers


def close(found: float, expected: float, within: float = 0.05) -> bool:
    return abs(found - expected) <= within * expected


RECOMPUTE = "recompute"
PIPELINE = "pipeline_parallel_schedule"


@pytest.mark.parametrize(
    ("model", "world", "fields"),
    [
        ("qwen3", 2, {}),
        ("qwen3", 4, {"data_parallel_replicate_degree": 2}),
        ("nanochat", 2, {}),
        ("qwen3", 2, {"tensor_parallel_degree": 2}),
        ("qwen3", 2, {"context_parallel_degree": 2}),
        ("qwen3", 2, {"pipeline_parallel_degree": 2}),
        ("moe", 2, {"expert_parallel_degree": 2}),
        ("qwen3", 8, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}),
        *(
            pytest.param(model, world, fields, marks=pytest.mark.slow)
            for model, world, fields in [
                ("nanochat", 2, {"data_parallel_replicate_degree": 2}),
                ("nanochat", 4, {"fsdp_reshard_after_forward": "never"}),
                ("nanochat", 4, {"data_parallel_replicate_degree": 2}),
                ("qwen3 tied", 2, {"fsdp_reduce_last_only": True}),
                ("qwen3 tied", 4, {"tensor_parallel_degree": 2}),
                ("nanochat", 2, {"tensor_parallel_degree": 2}),
                ("nanochat", 4, {"tensor_parallel_degree": 4}),
                ("qwen3", 4, {"context_parallel_degree": 2, "context_parallel_method": "ring"}),
                ("qwen3", 4, {"context_parallel_degree": 2, "context_parallel_method": "ulysses"}),
                ("nanochat", 2, {"context_parallel_degree": 2}),
                ("nanochat", 4, {"context_parallel_degree": 2, "tensor_parallel_degree": 2}),
                ("moe", 4, {"expert_parallel_degree": 2, "tensor_parallel_degree": 2}),
                ("moe sigmoid", 4, {"expert_parallel_degree": 2}),
                ("moe", 2, {"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2}),
                ("qwen3", 2, {RECOMPUTE: "full"}),
                ("nanochat", 2, {RECOMPUTE: "op"}),
                ("qwen3", 2, {RECOMPUTE: "selective", "tensor_parallel_degree": 2}),
                ("qwen3 tied", 4, {"pipeline_parallel_degree": 2}),
                ("qwen3", 2, {"pipeline_parallel_degree": 2, PIPELINE: "Interleaved1F1B"}),
                (
                    "nanochat",
                    2,
                    {"pipeline_parallel_degree": 2, PIPELINE: "ZBVZeroBubble"},
                ),
                ("qwen3", 4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2}),
                ("qwen3 mtp", 2, {}),
                ("qwen3 mtp", 2, {RECOMPUTE: "full"}),
                ("qwen3 mtp", 2, {"tensor_parallel_degree": 2}),
                ("qwen3 mtp", 2, {"context_parallel_degree": 2}),
                ("qwen3 mtp", 2, {"pipeline_parallel_degree": 2}),
                ("nanochat mtp", 2, {}),
                ("nanochat mtp", 4, {"tensor_parallel_degree": 2}),
                ("nanochat mtp", 2, {"context_parallel_degree": 2}),
                ("nanochat mtp", 2, {"pipeline_parallel_degree": 2}),
            ]
        ),
    ],
    ids=lambda value: (
        ", ".join(f"{k} {v}" for k, v in value.items()) or "fsdp" if isinstance(value, dict) else None
    ),
)
def test_plan_is_what_a_run_does(model: str, world: int, fields: dict[str, Any]) -> None:
    fields = dict(fields)
    recompute = fields.pop(RECOMPUTE, "none")
    job = job_of(model, seq_len=128, **fields)
    job.activation_checkpoint.mode = recompute
    job = completed(job)
    run = fork_ranks(measured_on_rank, world, job, world)[0]
    plan = planned(job, world)
    memory = plan.memory
    assert close(memory.parameters, run.parameters)
    assert close(memory.gradients, run.gradients)
    assert close(memory.optimizer, run.optimizer)
    # a checkpoint's hooks keep what it needs out of sight, and a schedule that parts backward keeps gradients too
    in_sight = recompute == "none" and not plan.split_backward
    assert close(memory.activations, run.saved) or not in_sight
    assert close(memory.passes - memory.optimizer, run.alive), memory
    sent: Counter[tuple[str, str]] = Counter()
    for traffic in plan.traffic.values():
        for (axis, kind), size in traffic.bytes.items():
            sent[run.groups.get(axis, axis), kind] += size
    assert sent.keys() == run.sent.keys()
    for key, size in run.sent.items():
        assert close(sent[key], size), key
