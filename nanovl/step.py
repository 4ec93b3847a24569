"""One optimizer step: micro-batches, a loss over the tokens of the whole job, gradients, clipping, update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanovl.dist import all_reduce
from nanovl.models.blocks.head import Head
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


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    loss_group: dist.ProcessGroup | None,
    max_norm: float,
    chunk_tokens: int,
    cross_document_attention: bool = False,
    stop: bool = False,
) -> StepResult:
    """Leave the step's gradients, clipped, in the parameters; the caller updates them.

    The denominator is the sum of loss weights over all micro-batches and ranks, known before the first backward, so
    the gradients do not depend on how the rows are split.
    """
    device = next(model.parameters()).device
    weight = sum(
        (_loss_weights(b).sum(dtype=torch.float64) for b in batches), torch.zeros((), dtype=torch.float64)
    )
    # no target anywhere leaves a loss of 0 instead of 0/0
    denominator = all_reduce(weight.to(device), group=loss_group).clamp(min=1.0).float()
    total = torch.zeros((), device=device)
    for batch in batches:
        batch = to_device(batch, device)
        objective = partial(cross_entropy, batch=batch, denominator=denominator, chunk_tokens=chunk_tokens)
        loss = run_model(model, batch, objective, cross_document_attention)
        loss.backward()
        total += loss.detach()
    grad_norm = clip_gradients(list(model.parameters()), max_norm)
    sums = torch.stack((total.double(), torch.tensor(float(stop), dtype=torch.float64, device=device)))
    all_reduce(sums, group=loss_group)
    return StepResult(sums[0].item(), grad_norm, sums[1].item() > 0)


def run_model(model: nn.Module, batch: Batch, objective: Any, cross_document_attention: bool) -> Any:
    """`objective` on the model's hidden states of `batch`."""
    doc_ids_BT = None if cross_document_attention else batch["doc_ids_BT"]
    return model(batch["tokens_BT"], batch["positions_BT"], doc_ids_BT, objective=objective)


def cross_entropy(
    head: Head, x_BTD: Tensor, *, batch: Batch, denominator: Tensor, chunk_tokens: int
) -> Tensor:
    """Sum of weight x nats of this micro-batch over the weights of the whole step."""
    weights_BT = batch["weights_BT"] / denominator
    return head.cross_entropy(x_BTD, batch["targets_BT"], weights_BT, chunk_tokens)[0]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients over every rank; above `max_norm` they are scaled down to it (0 = never)."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _loss_weights(batch: Batch) -> Tensor:
    return batch["weights_BT"] * (batch["targets_BT"] >= 0)
