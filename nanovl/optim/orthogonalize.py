"""Muon's direction: from a matrix of momentum to the one that is orthogonal and even, on whole matrices.

Every function takes a batch of matrices [n, rows, cols] (several layers, or the experts of one) and works on
each. `second` is NorMuon's memory of squares, one number a row ([n, rows, 1], matrices at least as tall as
wide) or a column ([n, 1, cols], wide ones).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovl.config.schema import Muon

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413598596377, -1.7097828382687081, 0.42323551169305323),
)
"""Best odd quintics for 5 steps (arXiv:2505.16932)."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Muon's first quintic: steep at 0, so singular values end between about 0.7 and 1.2."""
CPU_SINGLE_SIDE = 160
"""Smaller side from which a CPU does float32 matrices one by one: up to 30 percent faster than as a batch.
Below it the batch wins, and in bfloat16 at every size (measured, see docs/optim.md)."""


def direction(
    momentum: Tensor, second: Tensor | None, muon: Muon, beta2: float, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The step's direction for `momentum` [n, rows, cols], in its dtype, and NorMuon's memory after it.

    `second` is left as it was; None = variance reduction is off.
    """
    x = orthogonalize(momentum, muon, compute_dtype)
    if muon.renormalize:
        x = renormalize(x)
    if second is None:
        return x, None
    return reduce_variance(x, second, beta2)


def orthogonalize(x: Tensor, muon: Muon, compute_dtype: torch.dtype) -> Tensor:
    """U V^T of each x = U S V^T, nearly; computed in `compute_dtype`, returned in x's own."""
    large = min(x.shape[-2:]) >= CPU_SINGLE_SIDE
    singly = x.device.type == "cpu" and compute_dtype != torch.bfloat16 and large
    if not singly or len(x) <= 1:
        return _orthogonalize_batch(x, muon, compute_dtype)
    return torch.cat([_orthogonalize_batch(matrix[None], muon, compute_dtype) for matrix in x])


def _orthogonalize_batch(matrices: Tensor, muon: Muon, compute_dtype: torch.dtype) -> Tensor:
    x = matrices.to(compute_dtype)
    if muon.row_equilibration:
        x = equilibrate_rows(x)
    if muon.orthogonalization == "polar_express":
        assert muon.iterations <= len(POLAR_EXPRESS)
        x = x * (1 / (1.01 * frobenius(x) + 1e-6)).to(x.dtype)
        quintics = POLAR_EXPRESS[: muon.iterations]
    else:
        x = x * (1 / (frobenius(x) + 1e-7)).to(x.dtype)
        quintics = (NEWTON_SCHULZ,) * muon.iterations
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in quintics:
        # singular values s -> a s + b s^3 + c s^5, through the smaller of the two Gram matrices
        gram = x.mT @ x if tall else x @ x.mT
        powers = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, powers, beta=a) if tall else torch.baddbmm(x, powers, x, beta=a)
    return x.to(matrices.dtype)


def equilibrate_rows(x: Tensor) -> Tensor:
    """Each row rescaled to the (root mean square) mean of all row norms (MuonEq, arXiv:2603.28254)."""
    row_norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    mean = frobenius(x) / x.shape[-2] ** 0.5
    return x * (mean / row_norms.clamp(min=1e-6)).to(x.dtype)


def renormalize(x: Tensor) -> Tensor:
    """Norm snapped to that of an orthogonal matrix, sqrt(min(rows, cols)) (Muon+, arXiv:2602.21545)."""
    return x * (min(x.shape[-2:]) ** 0.5 / frobenius(x).clamp(min=1e-6)).to(x.dtype)


def reduce_variance(x: Tensor, second: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Rows (columns of wide matrices) divided by the root of their running mean square, the norm kept.

    NorMuon, arXiv:2510.05491, without bias correction, as nanochat has it.
    """
    dim = second_dim(x.shape[-2], x.shape[-1])
    n = x.shape[dim]
    squares = x.square().mean(dim=dim, keepdim=True)
    second = second.lerp(squares, 1 - beta2)
    scale = second.clamp(min=1e-10).rsqrt()
    norm = (squares.sum(dim=(-2, -1), keepdim=True) * n).sqrt()
    new_norm = (squares * n * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return x * (scale * (norm / new_norm.clamp(min=1e-10))), second


def second_dim(rows: int, cols: int) -> int:
    """The dimension over which NorMuon averages: -1 (a number for each row) or, for wide matrices, -2."""
    return -1 if rows >= cols else -2


def frobenius(x: Tensor) -> Tensor:
    """Norm of each matrix, [n, 1, 1], in float32 at least."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
