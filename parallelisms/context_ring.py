"""Ring attention (arXiv:2310.01889): keys and values travel from rank to rank, and each rank adds up what it sees.

A rank never holds more than two ranks' keys and values, nor a mask. Scores of one tile of queries exist at a time, in
float32, by plain matrix products: slower than fused attention, for rows whose keys and values would not fit gathered.

With m the log-sum-exp of all scores seen so far, a block of scores s and values v is merged exactly:
    m' = logaddexp(m, logsumexp(s)),   out' = exp(m - m') out + exp(s - m') v.
A sink is a score of value 0 that is there from the start. Backward knows the last m, so each block's weights are
p = exp(s - m), and with do the gradient of out:
    dv = p^T do,   ds = p (do v^T - rowsum(do out)),   dq = ds k,   dk = ds^T q.
dk and dv travel with their keys and values, and after a whole round are home. With heat h of a query and cap c a score
is s = h u, u = c tanh(z / c), so that dz = h (1 - (u / c)^2) ds takes the place of ds in dq and dk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from nanovl.models.blocks.attention import AttentionMeta
from nanovl.parallelisms.context_cores import CutCore, CutMeta
from nanovl.parallelisms.context_cut import SequenceCut
from nanovl.parallelisms.context_tiles import Tile, capped_scores, tiles

# B batch, T tokens of this rank or of a tile (queries), S key tokens or the whole row, D head channels,
# H query heads, K key/value heads, G query heads a key head


@dataclass
class RingMeta(AttentionMeta):
    """Documents instead of masks: a mask of the whole row would be larger than its keys and values."""

    doc_ids_BS: Tensor | None = None
    """Of the whole row."""


class RingMetaBuilder(CutMeta):
    """Rotations and documents."""

    def forward(self, positions_BT: Tensor, doc_ids_BT: Tensor | None) -> RingMeta:
        rope = self.unmasked(positions_BT).rope
        return RingMeta(positions_BT, {}, rope, doc_ids_BS=self.whole_documents(doc_ids_BT))


class RingCore(CutCore):
    """Passes keys and values around. Any number of heads."""

    def forward(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        meta: AttentionMeta,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """-> [B, T, H, D]."""
        assert isinstance(meta, RingMeta)
        assert self.scores.sinks == (sinks_H is not None)
        scale = self.head_dim**-0.5 if self.scores.scale is None else self.scores.scale
        where = (self.cut.rank, self.cut.degree, self.cut.headtail, self.group.group_name)
        how = (self.window, scale, self.scores.softcap)
        heat_BT = self.scores.heat(meta.positions_BT)
        return ring_attention(q_BTHD, k_BTKD, v_BTKD, sinks_H, meta.doc_ids_BS, heat_BT, *where, *how)[0]


# Operators of their own, because a compiler cannot look into a loop of sends and receives.


@torch.library.custom_op("nanovl::ring_attention", mutates_args=())
def ring_attention(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    sinks_H: Tensor | None,
    doc_ids_BS: Tensor | None,
    heat_BT: Tensor | None,
    rank: int,
    degree: int,
    headtail: bool,
    group_name: str,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the whole row, and log-sum-exp of their scores, [B, K, G, T] float32."""
    cut, sizes = SequenceCut(rank, degree, headtail), (k_BTKD.shape[-1], v_BTKD.shape[-1])
    q_BKGTD = _grouped(q_BTHD, k_BTKD.shape[2]) * scale
    out_BKGTD = q_BKGTD.new_zeros((*q_BKGTD.shape[:-1], sizes[1]))
    lse_BKGT = torch.full_like(q_BKGTD[..., 0], -torch.inf)
    if sinks_H is not None:
        lse_BKGT.copy_(_by_group(sinks_H, k_BTKD.shape[2]))
    kv_BTKD = torch.cat((k_BTKD, v_BTKD), dim=-1)
    for step in range(degree):
        hop = _Hop(kv_BTKD, group_name) if step < degree - 1 else None
        k_BKSD, v_BKSD = kv_BTKD.transpose(1, 2).float().split(sizes, dim=-1)
        for tile in tiles(cut, (rank - step) % degree, q_BTHD.shape[1], window):
            out, lse = out_BKGTD[..., tile.queries, :], lse_BKGT[..., tile.queries]
            score_BKGTS, mask = capped_scores(tile, q_BKGTD, k_BKSD, doc_ids_BS, window, softcap)
            if heat_BT is not None:
                score_BKGTS.mul_(_by_query(heat_BT, tile))
            score_BKGTS.masked_fill_(~mask, -torch.inf)
            after = torch.logaddexp(lse, score_BKGTS.logsumexp(-1))
            # a query that has seen nothing yet keeps -inf, and must not subtract it from itself
            base = after.masked_fill(after == -torch.inf, 0.0)
            p_BKGTS = score_BKGTS.sub_(base[..., None]).exp_()
            out.mul_((lse - base).exp()[..., None])
            out.add_(torch.einsum("bkgts,bksd->bkgtd", p_BKGTS, v_BKSD[:, :, tile.keys]))
            lse.copy_(after)
        if hop is not None:
            kv_BTKD = hop.arrived()
    return _flat(out_BKGTD, q_BTHD.dtype), lse_BKGT


@torch.library.custom_op("nanovl::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    dout_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    drift_BKGT: Tensor,
    lse_BKGT: Tensor,
    doc_ids_BS: Tensor | None,
    heat_BT: Tensor | None,
    rank: int,
    degree: int,
    headtail: bool,
    group_name: str,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `drift_BKGT` is the row sum of the output times its gradient."""
    cut, sizes = SequenceCut(rank, degree, headtail), (k_BTKD.shape[-1], v_BTKD.shape[-1])
    q_BKGTD, dout_BKGTD = (_grouped(x, k_BTKD.shape[2]) for x in (q_BTHD, dout_BTHD))
    q_BKGTD *= scale
    dq_BKGTD = torch.zeros_like(q_BKGTD)
    kv_BTKD = torch.cat((k_BTKD, v_BTKD), dim=-1)
    dkv_BKSD = torch.zeros(kv_BTKD.transpose(1, 2).shape, device=kv_BTKD.device)
    for step in range(degree):
        hop = _Hop(kv_BTKD, group_name) if step < degree - 1 else None
        k_BKSD, v_BKSD = kv_BTKD.transpose(1, 2).float().split(sizes, dim=-1)
        dk_BKSD, dv_BKSD = dkv_BKSD.split(sizes, dim=-1)
        for tile in tiles(cut, (rank - step) % degree, q_BTHD.shape[1], window):
            u_BKGTS, mask = capped_scores(tile, q_BKGTD, k_BKSD, doc_ids_BS, window, softcap)
            score_BKGTS = u_BKGTS if heat_BT is None else u_BKGTS * _by_query(heat_BT, tile)
            p_BKGTS = (score_BKGTS - lse_BKGT[..., tile.queries, None]).exp_().masked_fill_(~mask, 0.0)
            dout = dout_BKGTD[..., tile.queries, :]
            dv_BKSD[:, :, tile.keys] += torch.einsum("bkgts,bkgtd->bksd", p_BKGTS, dout)
            ds_BKGTS = torch.einsum("bkgtd,bksd->bkgts", dout, v_BKSD[:, :, tile.keys])
            ds_BKGTS.sub_(drift_BKGT[..., tile.queries, None]).mul_(p_BKGTS)
            if heat_BT is not None:
                ds_BKGTS.mul_(_by_query(heat_BT, tile))
            if softcap is not None:
                ds_BKGTS.mul_(1 - (u_BKGTS / softcap).square_())
            dq_BKGTD[..., tile.queries, :] += torch.einsum(
                "bkgts,bksd->bkgtd", ds_BKGTS, k_BKSD[:, :, tile.keys]
            )
            dk_BKSD[:, :, tile.keys] += torch.einsum(
                "bkgts,bkgtd->bksd", ds_BKGTS, q_BKGTD[..., tile.queries, :]
            )
        dkv_BKSD = _Hop(dkv_BKSD, group_name).arrived()
        if hop is not None:
            kv_BTKD = hop.arrived()
    dk_BTKD, dv_BTKD = (_own(x.transpose(1, 2), k_BTKD.dtype) for x in dkv_BKSD.split(sizes, dim=-1))
    return _flat(dq_BKGTD * scale, q_BTHD.dtype), dk_BTKD, dv_BTKD


class _Hop:
    """A tensor under way to the next rank, and the previous rank's on its way here."""

    def __init__(self, tensor: Tensor, group_name: str) -> None:
        resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        group: dist.ProcessGroup = resolve(group_name)
        rank, ranks = group.rank(), group.size()
        self.sent = tensor.contiguous()
        self.received = torch.empty_like(self.sent)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, group=group, group_peer=(rank + 1) % ranks),
                dist.P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % ranks),
            ]
        )

    def arrived(self) -> Tensor:
        """What the previous rank sent."""
        for work in self.works:
            work.wait()
        return self.received


def _grouped(x_BTHD: Tensor, kv_heads: int) -> Tensor:
    """-> float32 [B, K, G, T, D]."""
    return x_BTHD.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).float().contiguous()


def _flat(x_BKGTD: Tensor, dtype: torch.dtype) -> Tensor:
    """-> [B, T, H, D]."""
    return _own(x_BKGTD.permute(0, 3, 1, 2, 4).flatten(2, 3), dtype)


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, in memory of its own, as an operator's results have to be."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _by_query(heat_BT: Tensor, tile: Tile) -> Tensor:
    """-> [B, 1, 1, T, 1] of the tile's queries."""
    return heat_BT[:, None, None, tile.queries, None]


def _by_group(sinks_H: Tensor, kv_heads: int) -> Tensor:
    """-> float32 [K, G, 1]."""
    return sinks_H.float().view(kv_heads, -1, 1)


@ring_attention.register_fake
def _shapes(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q_BTHD.shape
    kv_heads = k_BTKD.shape[2]
    lse = q_BTHD.new_empty((batch, kv_heads, heads // kv_heads, tokens), dtype=torch.float32)
    return q_BTHD.new_empty((batch, tokens, heads, v_BTKD.shape[-1])), lse


@ring_attention_backward.register_fake
def _backward_shapes(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks_H, doc_ids_BS, heat_BT, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, sinks_H, doc_ids_BS, heat_BT)


def _gradients(ctx: Any, dout_BTHD: Tensor, dlse_BKGT: Tensor) -> tuple[Any, ...]:
    q, k, v, out_BTHD, lse_BKGT, sinks_H, doc_ids_BS, heat_BT = ctx.saved_tensors
    drift_BTH = (dout_BTHD.float() * out_BTHD.float()).sum(-1)
    drift_BKGT = drift_BTH.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1).contiguous()
    dsinks_H = None
    if sinks_H is not None:
        weight_BKGT = (_by_group(sinks_H, k.shape[2]) - lse_BKGT).exp()
        dsinks_H = -(weight_BKGT * drift_BKGT).sum((0, 3)).flatten().to(sinks_H.dtype)
    seen = (doc_ids_BS, heat_BT, *ctx.settings)
    dqkv = ring_attention_backward(dout_BTHD, q, k, v, drift_BKGT, lse_BKGT, *seen)
    return (*dqkv, dsinks_H, *[None] * len(seen))


ring_attention.register_autograd(_gradients, setup_context=_keep)
