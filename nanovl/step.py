"""One optimizer step: micro-batches, a loss over the tokens of the whole job, gradients, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanovl.dist import all_reduce
from nanovl.mesh import Mesh
from nanovl.models.blocks.head import Head
from nanovl.optim.gradients import clip_gradients, global_norm
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.spec import Batch

# B rows, T tokens, D model


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean nats per weighted token over the whole job."""
    grad_norm: float
    """Global norm before clipping."""
    stop: bool
    """Whether some rank was asked to stop."""

    @property
    def finite(self) -> bool:
        """Whether the update may be taken; the same on all ranks, since both numbers are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    model: ParallelModel,
    batches: Sequence[Batch],
    *,
    max_norm: float,
    chunk_tokens: int,
    cross_document_attention: bool = False,
    stop: bool = False,
) -> StepResult:
    """Leave the step's gradients, clipped, in the parameters; the caller updates them, if the result is finite.

    The denominator is the sum of loss weights over all micro-batches and ranks, known before the first backward, so
    the gradients do not depend on how the rows are split.
    """
    mesh, device = model.mesh, model.device
    weight = sum(
        (_loss_weights(b).sum(dtype=torch.float64) for b in batches), torch.zeros((), dtype=torch.float64)
    ).to(device)
    if mesh.data_degree > 1:
        all_reduce(weight, group=mesh.group("batch"))
    denominator = weight.clamp(min=1.0).float()  # no target anywhere leaves a loss of 0 instead of 0/0
    objective = partial(cross_entropy, denominator=denominator, chunk_tokens=chunk_tokens)
    batches = [to_device(batch, device) for batch in batches]
    loss = model.backward(batches, objective, documents=not cross_document_attention)
    parameters = dict(model.named_parameters())
    counted = [p for name, p in parameters.items() if name not in model.elsewhere]
    norm = global_norm(counted, mesh.group("pp"))
    sums = sum_over_ranks(mesh, loss.double(), torch.tensor(float(stop), dtype=torch.float64, device=device))
    result = StepResult(sums[0].item(), norm.item(), sums[1].item() > 0)
    if result.finite:
        clip_gradients(parameters.values(), norm, max_norm)
    return result


def sum_over_ranks(mesh: Mesh, *values: Tensor) -> Tensor:
    """Each value added up over the ranks that have other tokens or another stage, stacked; tensor ranks have the same.

    A value that a rank has no part in is 0 there.
    """
    stacked = torch.stack(values)
    if mesh.rank("tp") > 0:
        stacked = torch.zeros_like(stacked)
    return all_reduce(stacked)


def cross_entropy(
    head: Head, x_BTD: Tensor, batch: Batch, *, denominator: Tensor, chunk_tokens: int
) -> Tensor:
    """Sum of weight x nats of this micro-batch over the weights of the whole step."""
    weights_BT = batch["weights_BT"] / denominator
    return head.cross_entropy(x_BTD, batch["targets_BT"], weights_BT, chunk_tokens)[0]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _loss_weights(batch: Batch) -> Tensor:
    return batch["weights_BT"] * (batch["targets_BT"] >= 0)
