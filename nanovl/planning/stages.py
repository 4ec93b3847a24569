"""The stages of a job as FSDP leaves them while they compute: cut, gathered, and rehearsed with one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanovl.config.schema import Job
from nanovl.device import Modes
from nanovl.mesh import Mesh
from nanovl.models.blocks.mtp import with_ahead
from nanovl.models.blocks.sparse_core import index_losses
from nanovl.optim.scaling import SizeRules
from nanovl.parallelisms import pipeline_split
from nanovl.parallelisms.apply import cut_part
from nanovl.parallelisms.expert_dispatch import ExpertDispatch, plan_trip
from nanovl.parallelisms.init import materialize
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.parallelisms.pipeline_schedule import Action
from nanovl.planning.attention import Capability, attend_as_on
from nanovl.planning.ledger import Traffic
from nanovl.planning.rehearsal import Rehearsed, rehearse
from nanovl.spec import Batch, Model, ModelSpec, Stream, expert_layers, run_batch
from nanovl.step import cross_entropies, mtp_factor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PlannedJob:
    """A checked job with every size filled in."""

    job: Job
    spec: ModelSpec
    rules: SizeRules
    modes: Modes
    world_size: int
    chunk_tokens: int
    offloaded: bool = False
    """Parameters, gradients and optimizer state are in host memory."""
    capability: Capability | None = None
    """Of the GPU whose attention is booked; None = this CPU's."""

    def rows_at_once(self, mesh: Mesh) -> int:
        """Rows of a micro-batch."""
        return self.job.training.local_batch_size or self.job.training.global_batch_size // mesh.data_degree

    def micro_batches(self, mesh: Mesh) -> int:
        """Of a step, on each rank."""
        return self.job.training.global_batch_size // (mesh.data_degree * self.rows_at_once(mesh))


def meta_model(asked: PlannedJob) -> Model:
    with torch.device("meta"):
        return asked.spec.family.model(asked.spec.config)


def cut_alike(asked: PlannedJob, mesh: Mesh) -> list[Model]:
    """The same stages without FSDP, whose parameters alone have the dtype in which they compute."""
    model = meta_model(asked)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(asked.modes.param_dtype)
    parts, _ = pipeline_split.split(model, asked.job, mesh)
    for part in parts:
        cut_part(part, asked.job, mesh)
        if asked.capability is not None:
            attend_as_on(asked.capability, part, deterministic=asked.job.debug.deterministic)
    return parts


def rehearse_stages(
    asked: PlannedJob, parallel: ParallelModel, parts: list[Model], rows: int, split_backward: bool
) -> dict[int, Rehearsed]:
    """A micro-batch through stages without FSDP, whose share is reckoned from its units; by number of the stage."""
    depths = parallel.parts[0].mtp_layers
    batch = parallel.sequence.cut(with_ahead(_rows(rows, asked.job.training.seq_len), depths))
    stages = dict(zip(parallel.pipeline.parts if parallel.pipeline else [0], parts, strict=True))
    found = {}
    for stage, part in stages.items():
        materialize(part, CPU)
        step_tokens = batch["tokens_BT"].numel()  # any number: what is computed is not looked at
        for loss in index_losses(part):
            loss.step_tokens = step_tokens
        for layer in expert_layers(part):
            layer.router.step_tokens = step_tokens
            if isinstance(layer.dispatch, ExpertDispatch) and layer.dispatch.ranks is not None:
                tokens = batch["tokens_BT"].numel() // (1 if layer.dispatch.cut else parallel.mesh.size("tp"))
                rows = tokens * layer.num_experts_per_tok
                layer.dispatch.plan = partial(plan_trip, read=partial(_even, rows))
        forward = partial(_forward, asked, parallel, part, stage, batch)
        found[stage] = rehearse(part, forward, split_backward=split_backward)
    return found


def _forward(
    asked: PlannedJob, parallel: ParallelModel, part: Model, stage: int, batch: Batch
) -> tuple[Stream, Any]:
    objective = partial(
        cross_entropies,
        denominators=torch.ones(1 + part.mtp_layers),
        mtp_factor=mtp_factor(part),
        chunk_tokens=asked.chunk_tokens,
    )
    stream: Stream = ()
    if parallel.pipeline is not None and stage > 0:
        stream = tuple(tensor.requires_grad_() for tensor in parallel.pipeline._room(stage, batch))
    documents = not asked.job.data.cross_document_attention
    return stream, run_batch(part, batch, objective, documents=documents, stream=stream)


def transfers(order: Sequence[Action], runs: Mapping[int, Rehearsed]) -> Traffic:
    """What a rank sends to its neighbours in the pipeline and receives from them, a step."""
    traffic = Traffic()
    for action in order:
        run = runs[action.stage]
        if action.kind in ("send_stream", "receive_gradient"):
            tensors, size = run.outputs
        else:
            tensors, size = run.inputs
        if action.kind.startswith("send"):
            traffic.add("pp", "send", size, tensors)
        elif action.kind.startswith("receive"):
            traffic.add("pp", "receive", size, tensors)
    return traffic


def _even(rows: int, sizes: Tensor) -> list[list[int]]:
    """`rows` token copies shared out alike, as balanced experts would; a fake tensor has no sizes."""
    ranks = sizes.shape[1]
    return 2 * [[rows // ranks + (rank < rows % ranks) for rank in range(ranks)]]


def _rows(rows: int, seq_len: int) -> Batch:
    whole = {"tokens_BT", "targets_BT", "positions_BT", "doc_ids_BT"}
    batch = {key: torch.zeros(rows, seq_len, dtype=torch.int64) for key in sorted(whole)}
    return {**batch, "weights_BT": torch.ones(rows, seq_len)}
