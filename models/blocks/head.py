"""The output head and its loss. Logits of a whole batch never exist at once: 2048 tokens x 152k entries are 1.2 GB."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, T tokens, N = B*T, C tokens of a chunk, D model, V vocabulary

ChunkLoss = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(raw logits, targets, weights, whether the gradient is wanted), as `chunk_loss`."""


class Head(nn.Module):
    """Hidden states -> float32 logits, softly capped: cap * tanh(logits / cap)."""

    def __init__(
        self, hidden_size: int, vocab_size: int, padded_vocab_size: int = 0, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.softcap = softcap
        self.weight = nn.Parameter(torch.empty(padded_vocab_size or vocab_size, hidden_size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """-> logits [..., V] float32; rows that only pad the vocabulary are cut off."""
        return softcapped(F.linear(x_BTD, self.weight[: self.vocab_size]).float(), self.softcap)

    def cross_entropy(
        self, x_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Sum of weight x negative log-likelihood (differentiable), and the likelihoods' -log, [B, T] float32 (not).

        `targets_BT` holds IGNORE_INDEX where there is none; such a token counts 0 whatever its weight.
        """
        loss, nll_N = ChunkedCrossEntropy.apply(
            x_BTD.flatten(0, 1),
            self.weight[: self.vocab_size],
            targets_BT.flatten(),
            weights_BT.flatten(),
            partial(chunk_loss, softcap=self.softcap),
            chunk_tokens,
        )
        return loss, nll_N.view(targets_BT.shape)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """cap * tanh(logits / cap)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of a linear head, chunk by chunk.

    Since the loss is one weighted sum, each chunk's gradient is known up to one factor while its logits are at hand:
    forward keeps d(loss)/dx and d(loss)/dW, backward only scales them. So logits are neither stored nor recomputed.
    With z the logits, c the cap, u = c tanh(z/c):  dz = w (softmax(u) - onehot) (1 - tanh(z/c)^2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        loss_of: ChunkLoss,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = any(ctx.needs_input_grad[:2])
        nll_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        dx_ND = torch.empty_like(x_ND) if wants_grad else None
        # summed over chunks in float32: bfloat16 would lose the later ones
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_grad else None
        for start in range(0, len(x_ND), chunk):
            part = slice(start, start + chunk)
            x_CD = x_ND[part]
            nll_N[part], dlogits_CV = loss_of(
                x_CD @ weight_VD.T, targets_N[part], weights_N[part], wants_grad
            )
            if dx_ND is not None and dweight_VD is not None and dlogits_CV is not None:
                dx_ND[part] = dlogits_CV @ weight_VD
                dweight_VD += dlogits_CV.T @ x_CD
        if dx_ND is not None and dweight_VD is not None:
            ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx_ND, dweight_VD = ctx.saved_tensors
        return dx_ND * grads[0], dweight_VD * grads[0], None, None, None, None


def chunk_loss(
    raw_CV: Tensor, targets_C: Tensor, weights_C: Tensor, wants_grad: bool, *, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """-log p(target) [C] float32 (0 where ignored), and the weighted gradient of the raw logits in their own dtype."""
    z_CV = raw_CV.float()
    tanh_CV = None if softcap is None else torch.tanh(z_CV / softcap)
    u_CV = z_CV if softcap is None or tanh_CV is None else softcap * tanh_CV
    valid_C = targets_C >= 0
    index_C1 = targets_C.clamp(min=0)[:, None]
    logp_CV = F.log_softmax(u_CV, dim=-1)
    nll_C = torch.where(valid_C, -logp_CV.gather(1, index_C1)[:, 0], 0.0)
    if not wants_grad:
        return nll_C, None
    w_C1 = (weights_C * valid_C)[:, None]
    d_CV = (
        logp_CV.exp_().mul_(w_C1).scatter_add_(1, index_C1, -w_C1)
    )  # in place: these passes are bound by memory
    if tanh_CV is not None:
        d_CV *= 1.0 - tanh_CV.square_()
    return nll_C, d_CV.to(raw_CV.dtype)
