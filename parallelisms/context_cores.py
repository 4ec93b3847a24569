"""Attention between tokens that are on different ranks, by gathering keys and values or by exchanging tokens for heads.

Passing keys and values around is in context_ring.py.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanovl.models.blocks.attention import AttentionCore, AttentionMeta, MetaBuilder, attend, visible
from nanovl.models.blocks.indexer import Index
from nanovl.models.blocks.sparse_core import SparseCore
from nanovl.models.nanochat import PreviousToken
from nanovl.parallelisms.context_cut import SequenceCut, visible_between, whole_row

# n ranks, B batch, T tokens of this rank, S tokens of the whole row, D head channels (model channels in x),
# H query heads, K key/value heads


class CutCore(AttentionCore):
    """An attention core for queries, keys and values of this rank's tokens."""

    def __init__(self, core: AttentionCore, cut: SequenceCut, group: dist.ProcessGroup) -> None:
        super().__init__(core.window, core.num_key_value_heads, core.head_dim, core.scores, core.value_dim)
        self.cut = cut
        self.group = group


class AllGatherCore(CutCore):
    """Gathers the row's keys and values; backward sums their gradients back. Any number of heads."""

    def forward(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        meta: AttentionMeta,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """-> [B, T, H, D]."""
        mask = meta.masks[self.window]
        assert mask is not None
        kv_BSKD = whole_row(torch.cat((k_BTKD, v_BTKD), dim=-1), self.cut, self.group)
        k_BSKD, v_BSKD = kv_BSKD.split((self.head_dim, self.value_dim), dim=-1)
        heat_BT = self.scores.heat(meta.positions_BT)
        size = q_BTHD.shape[1] // len(self.cut.chunks)
        out = []
        for i, chunk in enumerate(self.cut.chunks):  # a chunk looks at nothing behind it
            first = 0 if self.window is None else max(0, chunk * size - self.window + 1)
            queries, keys = slice(i * size, (i + 1) * size), slice(first, (chunk + 1) * size)
            qkv = (q_BTHD[:, queries], k_BSKD[:, keys], v_BSKD[:, keys])
            heat = None if heat_BT is None else heat_BT[:, queries]
            here = mask[..., queries, keys]
            out.append(attend(*qkv, here, scores=self.scores, sinks_H=sinks_H, heat_BT=heat))
        return torch.cat(out, dim=1)


class AllGatherSparseCore(SparseCore):
    """Gathers the row's keys and values and what keys are scored by; each rank's queries choose among all."""

    def __init__(self, core: AttentionCore, cut: SequenceCut, group: dist.ProcessGroup) -> None:
        assert isinstance(core, SparseCore)
        sizes = (core.num_key_value_heads, core.head_dim, core.scores, core.value_dim)
        super().__init__(core.window, *sizes, core.indexer)
        self.loss = core.loss
        self.cut = cut
        self.group = group

    def forward(  # type: ignore[override]
        self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, meta: AttentionMeta, index: Index
    ) -> Tensor:
        """-> [B, T, H, D]."""
        kv_BSHD = whole_row(torch.cat((k_BTHD, v_BTHD), dim=-1), self.cut, self.group)
        k_BSHD, v_BSHD = kv_BSHD.split((self.head_dim, self.value_dim), dim=-1)
        index = index._replace(k_BSD=whole_row(index.k_BSD, self.cut, self.group))
        return super().forward(q_BTHD, k_BSHD, v_BSHD, meta, index)


class UlyssesCore(CutCore):
    """Exchanges this rank's tokens of all heads for all tokens of some heads, and back (arXiv:2309.14509).

    Ranks must divide the query heads. Where they do not divide the key and value heads, these are repeated.
    """

    def forward(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        meta: AttentionMeta,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """-> [B, T, H, D]."""
        ranks = self.cut.degree
        copies = ranks // gcd(ranks, k_BTKD.shape[2])
        if copies > 1:
            k_BTKD, v_BTKD = (x.repeat_interleave(copies, dim=2) for x in (k_BTKD, v_BTKD))
        # one exchange of all three: the channels of a rank's heads, side by side
        shares = [x_BTHD.unflatten(2, (ranks, -1)).flatten(3) for x_BTHD in (q_BTHD, k_BTKD, v_BTKD)]
        sizes = [share.shape[3] for share in shares]
        rows_nBTD = exchange(torch.cat(shares, dim=3).movedim(2, 0), self.group)
        parts = rows_nBTD.movedim(0, 1).flatten(1, 2).split(sizes, dim=2)
        dims = (self.head_dim, self.head_dim, self.value_dim)
        q_BSHD, k_BSKD, v_BSKD = (x.unflatten(2, (-1, dim)) for x, dim in zip(parts, dims, strict=True))
        mask, heat_BT = meta.masks[self.window], self.scores.heat(meta.positions_BT)
        heat_BS = None if heat_BT is None else whole_row(heat_BT, self.cut, self.group)
        mine = None if sinks_H is None else sinks_H.chunk(ranks)[self.cut.rank]
        out_BSHD = attend(
            q_BSHD,
            k_BSKD,
            v_BSKD,
            mask,
            is_causal=mask is None,
            scores=self.scores,
            sinks_H=mine,
            heat_BT=heat_BS,
        )
        out_nBTHD = exchange(out_BSHD.unflatten(1, (ranks, -1)).movedim(1, 0), self.group)
        return out_nBTHD.movedim(0, 2).flatten(2, 3)


def exchange(x_n: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...], one part for each rank -> [n, ...], one part from each rank."""
    return _Exchange.apply(x_n, group.group_name)


class _Exchange(torch.autograd.Function):
    """All-to-all of equal parts, its own transpose; waits inside, as collectives.py says."""

    @staticmethod
    def forward(ctx: Any, x_n: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        one_each = [1] * len(x_n)
        operators = torch.ops._c10d_functional
        given = x_n.detach().contiguous()  # detached on both sides, as in collectives.py
        there: Tensor = operators.wait_tensor(
            operators.all_to_all_single(given, one_each, one_each, group_name)
        )
        return there.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Exchange.apply(grads[0], ctx.group_name), None


class CutMeta(MetaBuilder):
    """Builds what attention layers share where the sequence is cut: rotations of this rank's tokens, masks by place in
    the row."""

    def __init__(self, whole: MetaBuilder, cut: SequenceCut, group: dist.ProcessGroup) -> None:
        super().__init__(())
        self.windows, self.ropes = whole.windows, whole.ropes
        self.cut = cut
        self.group = group

    def unmasked(self, positions_BT: Tensor) -> AttentionMeta:
        """Rotations alone."""
        return AttentionMeta.build(positions_BT, None, (), self.ropes)

    def whole_documents(self, doc_ids_BT: Tensor | None) -> Tensor | None:
        """Document ids [B, S] of the whole row."""
        return None if doc_ids_BT is None else whole_row(doc_ids_BT, self.cut, self.group)


class AllGatherMeta(CutMeta):
    """Masks [B or 1, 1, T, S]: this rank's queries, all keys of the row."""

    def forward(self, positions_BT: Tensor, doc_ids_BT: Tensor | None) -> AttentionMeta:
        meta, doc_ids_BS = self.unmasked(positions_BT), self.whole_documents(doc_ids_BT)
        tokens, device = positions_BT.shape[1], positions_BT.device
        place_T = self.cut.places(tokens, device)
        place_S = torch.arange(self.cut.degree * tokens, device=device)
        for window in self.windows:
            meta.masks[window] = visible_between(place_T, place_S, window, doc_ids_BT, doc_ids_BS)
        return meta


class UlyssesMeta(CutMeta):
    """Masks of whole rows, as on one rank."""

    def forward(self, positions_BT: Tensor, doc_ids_BT: Tensor | None) -> AttentionMeta:
        meta, doc_ids_BS = self.unmasked(positions_BT), self.whole_documents(doc_ids_BT)
        tokens = self.cut.degree * positions_BT.shape[1]
        for window in self.windows:
            meta.masks[window] = visible(tokens, window, doc_ids_BS, positions_BT.device)
        return meta


class PreviousAcrossCut(PreviousToken):
    """x_(t-1) where the token before a chunk is on another rank: ranks tell each other their chunks' last tokens."""

    def __init__(self, cut: SequenceCut, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.cut = cut
        self.group = group

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        chunks = x_BTD.chunk(len(self.cut.chunks), dim=1)
        last_BTD = torch.cat([chunk[:, -1:] for chunk in chunks], dim=1)
        # one token a chunk, in the order of the row; the first chunk's zeros come from here too, so that every rank
        # has this gather in its graph, and its counterpart in backward
        before_BSD = F.pad(whole_row(last_BTD, self.cut, self.group), (0, 0, 1, -1))
        shifted = []
        for number, chunk in zip(self.cut.chunks, chunks, strict=True):
            shifted += [before_BSD[:, number : number + 1], chunk[:, :-1]]
        return torch.cat(shifted, dim=1) * (positions_BT > 0)[..., None]
