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
from nanovl.models.blocks.mtp import with_ahead
from nanovl.optim.gradients import clip_gradients, global_norm
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.spec import Batch, Model

# B rows, T tokens, D model, U depths of multi-token prediction


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean nats per weighted token over the whole job."""
    grad_norm: float
    """Global norm before clipping."""
    stop: bool
    """Whether some rank was asked to stop."""
    mtp_losses: tuple[float, ...] = ()
    """The same mean for each depth of multi-token prediction."""

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

    The denominators are sums of loss weights over all micro-batches and ranks, known before the first backward, so the
    gradients do not depend on how the rows are split.
    """
    mesh, device, part = model.mesh, model.device, model.parts[0]
    batches = [with_ahead(batch, part.mtp_layers) for batch in batches]
    weights = torch.stack([loss_weights(batch) for batch in batches]).sum(0).to(device)
    if mesh.data_degree > 1:
        all_reduce(weights, group=mesh.group("batch"))
    denominators = weights.clamp(min=1.0).float()  # no target anywhere leaves a loss of 0 instead of 0/0
    objective = partial(
        cross_entropies, denominators=denominators, mtp_factor=mtp_factor(part), chunk_tokens=chunk_tokens
    )
    batches = [to_device(batch, device) for batch in batches]
    losses = model.backward(batches, objective, documents=not cross_document_attention)
    parameters = dict(model.named_parameters())
    counted = [p for name, p in parameters.items() if name not in model.elsewhere]
    norm = global_norm(counted, mesh.group("pp"))
    losses = losses.double().expand(len(weights))  # a stage without the head has one 0
    asked = torch.tensor(float(stop), dtype=torch.float64, device=device)
    loss, *mtp_losses, stops = sum_over_ranks(mesh, *losses, asked).tolist()
    result = StepResult(loss, norm.item(), stops > 0, tuple(found / mtp_factor(part) for found in mtp_losses))
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


def cross_entropies(
    head: Head,
    x_BTD: Tensor,
    batch: Batch,
    *ahead: Tensor,
    denominators: Tensor,
    mtp_factor: float,
    chunk_tokens: int,
) -> Tensor:
    """The next token's `cross_entropy`, and that of each depth of multi-token prediction times `mtp_factor`, [1 + U];
    each has a denominator of its own."""
    found = [cross_entropy(head, x_BTD, batch, denominator=denominators[0], chunk_tokens=chunk_tokens)]
    for k, ahead_BTD in enumerate(ahead):
        weights_BT = batch["ahead_weights_BTU"][..., k] * (mtp_factor / denominators[1 + k])
        targets_BT = batch["ahead_targets_BTU"][..., k]
        found.append(head.cross_entropy(ahead_BTD, targets_BT, weights_BT, chunk_tokens)[0])
    return torch.stack(found)


def mtp_factor(model: Model) -> float:
    """What the loss of each depth is multiplied by in what is trained, so that together they are a weighted mean."""
    return model.mtp_loss_weight / max(1, model.mtp_layers)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def loss_weights(batch: Batch) -> Tensor:
    """Sums of the loss weights of next tokens, and of each depth's, [1 + U] float64."""
    next_1 = (batch["weights_BT"] * (batch["targets_BT"] >= 0)).sum(dtype=torch.float64)[None]
    if "ahead_BTU" not in batch:
        return next_1
    ahead_BTU = batch["ahead_weights_BTU"] * (batch["ahead_targets_BTU"] >= 0)
    return torch.cat((next_1, ahead_BTU.sum((0, 1), dtype=torch.float64)))
