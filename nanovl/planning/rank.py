"""What one rank of a job holds and sends, found out in one process: a fake process group, tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanovl.build import build_optimizers
from nanovl.dist import all_reduce
from nanovl.log import Log
from nanovl.mesh import Mesh, build_mesh
from nanovl.optim.build import Optimizers
from nanovl.optim.expert_balance import ExpertBalance
from nanovl.optim.gradients import global_norm
from nanovl.optim.index_loss import IndexLosses
from nanovl.parallelisms.apply import parallelize
from nanovl.parallelisms.fsdp import reshards_after_forward
from nanovl.parallelisms.init import materialize
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.parallelisms.pipeline_schedule import Action
from nanovl.planning.groups import Groups
from nanovl.planning.ledger import Account, Ledger, Traffic
from nanovl.planning.passes import most_in_passes
from nanovl.planning.rehearsal import Rehearsed
from nanovl.planning.schedule import most_alive
from nanovl.planning.sharding import (
    StageUnits,
    UseOfUnits,
    fsdp_traffic,
    gathered_bytes,
    local_bytes,
    units_of,
)
from nanovl.planning.stages import PlannedJob, cut_alike, meta_model, rehearse_stages, transfers
from nanovl.step import sum_over_ranks

Purpose = Literal["sharding", "layers", "stages", "update"]
"""Why ranks talk: FSDP's weights and gradients; inside of layers and loss; between stages; around the update."""

CPU = torch.device("cpu")
NOBODY = Log(-1)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Weights that FSDP has gathered, at most."""
    activations: int
    """Kept from forward to backward, of all micro-batches in flight."""
    working: int
    """Beside these, at most: inside of a layer and in the loss."""
    update: int
    """Beside parameters, gradients and optimizer state, at most: inside of the optimizers' step."""
    passes: int
    """Everything at most during forward and backward, when not all of the above is there at the same time; of an
    offloaded job what is on the GPU."""

    @property
    def persistent(self) -> int:
        """What is there between steps, and gradients."""
        return self.parameters + self.gradients + self.optimizer

    def most(self, *, offloaded: bool) -> int:
        """At most on the GPU; `offloaded` = what persists is on the host, and updated there."""
        if offloaded:
            return self.passes
        return max(self.passes, self.persistent + self.update)


@dataclass(frozen=True)
class RankPlan:
    """One rank's share of a step."""

    rank: int
    layers: list[int]
    memory: Memory
    logits: int
    """Bytes of `memory.working` while the loss works on a chunk of logits."""
    traffic: dict[Purpose, Traffic]
    """By mesh axis, a step."""
    members: dict[str, list[int]]
    """Ranks of the job along each axis that traffic names, this one among them."""
    micro_batches: int
    in_flight: int
    """Micro-batches whose activations are alive at the same time, those in several stages counted so often."""
    split_backward: bool
    """Whether the schedule parts gradients of inputs from those of weights."""
    recomputed: float
    """Share of the layers' forward that backward does again."""
    update_flops: float
    """Of the optimizers' matrix products."""


def plan_rank(asked: PlannedJob, rank: int) -> RankPlan:
    """The share of `rank`. Name FSDP's first rank among its peers: no shard is larger than its."""
    with _as_rank(rank, asked.world_size):
        return _plan_rank(asked, rank)


@contextmanager
def _as_rank(rank: int, world_size: int) -> Iterator[None]:
    """A world of which this process is `rank`."""
    assert not dist.is_initialized(), "a plan is made where there is no process group"
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    # meshes of two worlds are equal to torch, which would hand out what it derived for the last one, groups included
    _clear_sharding_prop_cache()
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # for the world that comes next, which may be a real one


def _plan_rank(asked: PlannedJob, rank: int) -> RankPlan:
    job = asked.job
    mesh = build_mesh(job.parallelism, asked.world_size, CPU)
    parallel = parallelize(meta_model(asked), job, mesh, asked.modes, NOBODY)
    unsharded = cut_alike(asked, mesh)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for part in parallel.parts:
            materialize(part, CPU)
    # not under the mode: the optimizers read ranks off the mesh, which must stay real
    optimizers = build_optimizers(job, asked.spec, parallel, asked.rules, asked.modes, NOBODY)
    balance, index_losses = ExpertBalance(parallel.whole, mesh), IndexLosses(parallel.whole, mesh)
    micro_batches = asked.micro_batches(mesh)
    if parallel.pipeline is not None:
        order = parallel.pipeline.plan(micro_batches)[mesh.rank("pp")]
    else:
        order = [Action(kind, 0, i) for i in range(micro_batches) for kind in ("forward", "backward")]
    split_backward = any(action.kind == "backward_weight" for action in order)
    with fake:
        update = _update(parallel, optimizers, balance, index_losses)
        runs = rehearse_stages(asked, parallel, unsharded, asked.rows_at_once(mesh), split_backward)
    use = _use_of_units(asked, mesh)
    units = {
        stage: units_of(part, mesh, use.reshards) for stage, part in zip(runs, parallel.parts, strict=True)
    }
    groups, layers = Groups(mesh), Traffic()
    for run in runs.values():
        layers.add_all(run.traffic, micro_batches)
    return RankPlan(
        rank=rank,
        layers=[int(index) for part in parallel.parts for index in part.layers],
        memory=_memory(parallel, optimizers, units, use, runs, order, update, offloaded=asked.offloaded),
        logits=max(run.head_bytes for run in runs.values()),
        traffic={
            "sharding": fsdp_traffic(chain.from_iterable(u.all for u in units.values()), use),
            "layers": groups.named(layers),
            "stages": transfers(order, runs),
            "update": groups.named(update.traffic),
        },
        members=groups.members,
        micro_batches=micro_batches,
        in_flight=most_alive(order, dict.fromkeys(runs, 1)),
        split_backward=split_backward,
        recomputed=sum(run.recomputed_flops for run in runs.values())
        / max(sum(run.forward_flops for run in runs.values()), 1.0),
        update_flops=update.flops + update.batched_flops,
    )


def _memory(
    parallel: ParallelModel,
    optimizers: Optimizers,
    units: Mapping[int, StageUnits],
    use: UseOfUnits,
    runs: Mapping[int, Rehearsed],
    order: Sequence[Action],
    update: Account,
    *,
    offloaded: bool,
) -> Memory:
    parameters = [p for _, p in parallel.named_parameters()]
    states = (v for o in optimizers.optimizers for state in o.state.values() for v in state.values())
    of_parameters, of_states = sum(map(local_bytes, parameters)), sum(map(local_bytes, states))
    return Memory(
        parameters=of_parameters,
        gradients=sum(local_bytes(p) for p in parameters if p.requires_grad),
        optimizer=of_states,
        gathered=gathered_bytes(chain.from_iterable(u.all for u in units.values()), use),
        activations=most_alive(order, {stage: run.kept_bytes for stage, run in runs.items()}),
        working=max(run.working_bytes for run in runs.values()),
        update=update.peak,
        passes=most_in_passes(order, runs, units, use) + (0 if offloaded else of_parameters + of_states),
    )


def _use_of_units(asked: PlannedJob, mesh: Mesh) -> UseOfUnits:
    """How often a step gathers weights and sums gradients."""
    config, micro_batches = asked.job.parallelism, asked.micro_batches(mesh)
    pipelined, reshards = mesh.size("pp") > 1, reshards_after_forward(config, mesh)
    return UseOfUnits(
        reshards=reshards,
        copies=mesh.size("dp_replicate"),
        # the stages of a pipeline keep weights until their last backward, and sum gradients then
        gathers=1 if pipelined and not reshards else micro_batches,
        reduces=1 if pipelined or config.fsdp_reduce_last_only else micro_batches,
        micro_batches=micro_batches,
        param_bytes=asked.modes.param_dtype.itemsize,
        reduce_bytes=getattr(torch, asked.job.training.mixed_precision_reduce).itemsize,
        master_bytes=0 if asked.offloaded else torch.float32.itemsize,
    )


def _update(
    parallel: ParallelModel, optimizers: Optimizers, balance: ExpertBalance, index_losses: IndexLosses
) -> Account:
    """What a step does outside of forward and backward: loss and norm, experts' loads, indexers' losses, and the
    optimizers' own."""
    mesh, parameters = parallel.mesh, dict(parallel.named_parameters())
    losses = 1 + parallel.parts[0].mtp_layers
    for ledger in (
        Ledger(),
        Ledger(),
    ):  # once in vain: DTensor's first time tries shapes out, on whole tensors
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with ledger:
            if mesh.data_degree > 1:
                all_reduce(torch.zeros(losses, dtype=torch.float64), group=mesh.group("batch"))
            parallel.sum_copies()
            counted = [p for name, p in parameters.items() if name not in parallel.elsewhere]
            global_norm(counted, mesh.group("pp"))
            sum_over_ranks(mesh, *torch.zeros(losses + 1, dtype=torch.float64))
            if parallel.pipeline is not None:
                parallel.pipeline.tied.sum_gradients()
            balance.end_step(update=True)
            index_losses.end_step()
            optimizers.step()
    return ledger.account
