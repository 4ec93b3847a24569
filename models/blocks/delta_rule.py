"""The gated delta rule (arXiv:2412.06464): a matrix that recalls values by keys, corrects what it recalls, and forgets.

For every head, with S_0 = 0 [key channels, value channels], log-decay g <= 0, keys of length 1 and 0 < beta < 1:

    S'_t = e^(g_t) S_(t-1)        S_t = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T        o_t = S_t^T q_t

A document starts where g = -inf: what was before is multiplied by exactly 0, and so is its gradient. Sums of g are
never subtracted from each other: that would make -inf - -inf, and lose small decays beside large ones.

Everything is float32, whatever the model computes in, as the flash-linear-attention library and transformers have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, T tokens, H heads, X key channels, Y value channels, M chunks of a row, C tokens of a chunk

CHUNK = 64
"""Tokens whose corrections are solved for at once; the state is carried from chunk to chunk."""


class DeltaRule(nn.Module):
    """The rule over rows that start from nothing. A child of its layer, like `core` of attention: the engine puts one
    that remembers in its place."""

    def __init__(self, heads: int, key_channels: int, value_channels: int) -> None:
        super().__init__()
        self.state_shape = (heads, key_channels, value_channels)

    def forward(
        self, q_BTHX: Tensor, k_BTHX: Tensor, v_BTHY: Tensor, g_BTH: Tensor, beta_BTH: Tensor
    ) -> Tensor:
        """-> [B, T, H, Y] float32."""
        return chunked(q_BTHX, k_BTHX, v_BTHY, g_BTH, beta_BTH)[0]


def recurrent(
    q_BTHX: Tensor,
    k_BTHX: Tensor,
    v_BTHY: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHXY: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule as it is defined, token after token: for one new token, and as the reference. Returns outputs and the
    last state."""
    q, k, v, g, beta = (x.float().unbind(1) for x in (q_BTHX, k_BTHX, v_BTHY, g_BTH, beta_BTH))
    state = _empty_state(k_BTHX, v_BTHY) if state_BHXY is None else state_BHXY
    out = []
    for q_BHX, k_BHX, v_BHY, g_BH, beta_BH in zip(q, k, v, g, beta, strict=True):
        state = state * g_BH.exp()[..., None, None]
        recalled_BHY = (k_BHX[..., None, :] @ state)[..., 0, :]
        state = state + k_BHX[..., None] * (beta_BH[..., None] * (v_BHY - recalled_BHY))[..., None, :]
        out.append((q_BHX[..., None, :] @ state)[..., 0, :])
    return torch.stack(out, dim=1), state


def chunked(
    q_BTHX: Tensor,
    k_BTHX: Tensor,
    v_BTHY: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHXY: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same, in products of matrices: only chunks wait for each other.

    With d_ij the decay from token j to token i of a chunk and d_i that from its start, the corrections u of a chunk
    solve (I + A) u = beta (v - d S^T k), A_ij = beta_i d_ij k_i k_j for j < i. With [U | W] = (I + A)^-1 beta [v | d k]

        u = U - W S        o_i = d_i S^T q_i + sum_(j <= i) d_ij (q_i k_j) u_j        S <- d_C S + sum_j d_Cj k_j u_j^T
    """
    T = q_BTHX.shape[1]
    chunk = min(chunk, T)
    q, k, v, g, beta = (_in_chunks(x, chunk) for x in (q_BTHX, k_BTHX, v_BTHY, g_BTH, beta_BTH))
    from_start_MBHC = g.cumsum(-1).exp()
    between_MBHCC = decay_between(g)
    k_t, beta_1 = k.transpose(-1, -2), beta[..., None]
    system = (beta_1 * k @ k_t * between_MBHCC).tril(-1)  # the solver takes the diagonal for 1
    wanted = torch.cat((beta_1 * v, (beta * from_start_MBHC)[..., None] * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    value_MBHCY, reads_MBHCX = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    weight_MBHCC = q @ k_t * between_MBHCC
    q = q * from_start_MBHC[..., None]
    k_t = k_t * between_MBHCC[..., -1:, :]
    end_MBH11 = from_start_MBHC[..., -1, None, None]
    state = _empty_state(k_BTHX, v_BTHY) if state_BHXY is None else state_BHXY
    out = []
    for m in range(len(q)):
        u_BHCY = value_MBHCY[m] - reads_MBHCX[m] @ state
        out.append(q[m] @ state + weight_MBHCC[m] @ u_BHCY)
        state = end_MBH11[m] * state + k_t[m] @ u_BHCY
    out_BMCHY = torch.stack(out).permute(1, 0, 3, 2, 4)
    return out_BMCHY.flatten(1, 2)[:, :T], state


def decay_between(g_C: Tensor) -> Tensor:
    """exp of the sum of g over tokens j + 1 to i, [..., C, C]; 0 for j > i."""
    size = g_C.shape[-1]
    lower_CC = torch.ones(size, size, dtype=torch.bool, device=g_C.device).tril()
    # column j holds the decays behind token j
    g_CC = torch.where(lower_CC.tril(-1), g_C[..., None], 0.0)
    return g_CC.cumsum(-2).masked_fill(~lower_CC, float("-inf")).exp()


def _in_chunks(x_BTH: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] -> [M, B, H, C, ...] float32. Zeros at the end decay nothing and correct nothing."""
    missing = -x_BTH.shape[1] % chunk
    padding = (0, 0) * (x_BTH.ndim - 2) + (0, missing)
    x_BMCH = F.pad(x_BTH.float(), padding).unflatten(1, (-1, chunk))
    return x_BMCH.movedim((1, 3), (0, 2))


def _empty_state(k_BTHX: Tensor, v_BTHY: Tensor) -> Tensor:
    batch, _, heads, key_channels = k_BTHX.shape
    return k_BTHX.new_zeros(batch, heads, key_channels, v_BTHY.shape[-1], dtype=torch.float32)
