"""A job's ranks put together: does it fit, how long does a step take, what does it cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from nanovl.build import check_parallelism, resolve_sizes
from nanovl.config.schema import Job
from nanovl.device import decide_modes, loss_chunk_tokens
from nanovl.initial import vocabulary
from nanovl.log import aside
from nanovl.parallelisms.pipeline_schedule import actions
from nanovl.parallelisms.pipeline_split import costs, layers_of_stages
from nanovl.planning.hardware import USABLE_MEMORY, Gpu, seconds
from nanovl.planning.rank import Purpose, RankPlan, plan_rank
from nanovl.planning.schedule import simulate
from nanovl.planning.stages import PlannedJob, meta_model
from nanovl.registry import resolve_model

CUDA = torch.device("cuda")  # only named: the jobs that are planned run on GPUs
GIB = 2**30


@dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    products: float
    """Forward, backward and what is recomputed, on the rank that is last to end."""
    inside_layers: float
    """Collectives that the products wait for."""
    waiting: float
    """Bubble of the pipeline."""
    sharding: float
    """FSDP's collectives; they overlap with all of the above, and count where they take longer."""
    update: float
    """Collectives of loss, norm and optimizers, and their arithmetic."""
    memory: float
    """Reading and writing weights and optimizer state."""

    @property
    def step(self) -> float:
        computing = self.products + self.inside_layers + self.waiting
        return max(computing, self.sharding) + self.update + self.memory


@dataclass(frozen=True)
class Plan:
    """Everything `nanovl plan` has to say."""

    asked: PlannedJob
    gpu: Gpu
    offloaded: bool
    """Parameters, gradients and optimizer state are in host memory."""
    ranks: list[RankPlan]
    """The first rank of every pipeline rank."""
    bubble: float
    """Share of a step that a rank of the pipeline waits."""
    flops: float
    """Of the model, a step, all ranks: 3 times forward."""
    recomputed_flops: float
    """Beside these."""
    times: Times

    @property
    def worst(self) -> RankPlan:
        """The rank with the most on its GPU."""
        return max(self.ranks, key=self.bytes_of)

    def bytes_of(self, rank: RankPlan) -> int:
        """Bytes on the rank's GPU."""
        return rank.memory.most(offloaded=self.offloaded)

    @property
    def usable_bytes(self) -> float:
        return self.gpu.memory_gib * GIB * USABLE_MEMORY

    @property
    def fits(self) -> bool:
        return self.bytes_of(self.worst) <= self.usable_bytes

    @property
    def tokens(self) -> int:
        """Of a step."""
        training = self.asked.job.training
        return training.global_batch_size * training.seq_len

    @property
    def mfu(self) -> float:
        """Model FLOPs a second over the peak of all GPUs."""
        return self.flops / (self.times.step * self.asked.world_size * self.gpu.flops)


def question(job: Job, world_size: int, gpu: Gpu) -> PlannedJob:
    """`job` as the trainer would complete it on `gpu`s. Raises ConfigError for what the trainer would refuse."""
    check_parallelism(job, world_size, CUDA)
    spec = resolve_model(job.model, vocabulary(job))
    job, rules = resolve_sizes(job, spec, world_size)
    training = job.training
    modes = decide_modes(
        CUDA, spec.config.hidden_size, training.steps, training.mixed_precision_param, job.compile.enable
    )
    chunk = training.loss_chunk_tokens or loss_chunk_tokens(CUDA, spec.config.vocab_size)
    return PlannedJob(job, spec, rules, modes, world_size, chunk, capability=gpu.capability)


def plan(asked: PlannedJob, gpu: Gpu, mfu_ceiling: float, gpus_per_node: int) -> Plan:
    """The plan of a job; `mfu_ceiling` = share of the peak that products reach when nothing waits."""
    config = asked.job.parallelism
    # neither can be applied to a CPU's mesh, and both leave sizes and traffic as they are
    here = replace(config, enable_cpu_offload=False, enable_async_tensor_parallel=False)
    built = replace(asked, job=replace(asked.job, parallelism=here), offloaded=config.enable_cpu_offload)
    pp = config.pipeline_parallel_degree
    ranks = []
    for place in range(pp):
        rank = place * asked.world_size // pp
        aside(
            f"  planning rank {rank:,} of {asked.world_size:,}"
            + (f" ({place + 1} of {pp})" if pp > 1 else "")
        )
        ranks.append(plan_rank(built, rank))
    *layers, head = costs(meta_model(asked), asked.job.training.seq_len)
    recomputed = max(rank.recomputed for rank in ranks)
    rate = gpu.flops * mfu_ceiling

    tokens = asked.job.training.global_batch_size * asked.job.training.seq_len
    rank_tokens = tokens * pp / asked.world_size  # of all micro-batches; tensor and context ranks share a row
    stages = _stage_costs(asked, layers, head)
    micro_batches = ranks[0].micro_batches
    forward = [cost * rank_tokens / micro_batches / rate for cost, _ in stages]
    again = [cost * recomputed * rank_tokens / micro_batches / rate for _, cost in stages]
    if pp == 1:
        products, bubble = micro_batches * (3 * forward[0] + again[0]), 0.0
    else:
        split = any(rank.split_backward for rank in ranks)
        orders = actions(here, micro_batches, split_backward=split)
        busy = simulate(orders, forward, again)
        products, bubble = busy.longest * (1 - busy.bubble), busy.bubble

    def communication(purpose: Purpose) -> float:
        return max(
            sum(
                seconds(what, size, rank.members[axis], gpu, gpus_per_node)
                for (axis, what), size in rank.traffic[purpose].bytes.items()
            )
            for rank in ranks
        )

    inside_layers = communication("layers")
    times = Times(
        products=products,
        inside_layers=inside_layers,
        waiting=(products + inside_layers) * bubble / (1 - bubble),
        sharding=communication("sharding"),
        update=communication("update") + max(rank.update_flops for rank in ranks) / rate,
        memory=max(2 * rank.memory.persistent for rank in ranks) / gpu.memory_rate,
    )
    return Plan(
        asked,
        gpu,
        config.enable_cpu_offload,
        ranks,
        bubble,
        3 * (sum(layers) + head) * tokens,
        recomputed * sum(layers) * tokens,
        times,
    )


def _stage_costs(asked: PlannedJob, layers: list[float], head: float) -> list[tuple[float, float]]:
    """Forward FLOPs a token of every stage, and of its layers alone."""
    counts = [len(layers)]
    if asked.job.parallelism.pipeline_parallel_degree > 1:
        counts = layers_of_stages(meta_model(asked), asked.job)
    of_layers = [sum(layers[a:b]) for a, b in pairwise([0, *accumulate(counts)])]
    return [(cost + (head if i == len(counts) - 1 else 0.0), cost) for i, cost in enumerate(of_layers)]
