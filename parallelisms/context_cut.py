"""Which tokens of a row a rank of the context group has, and how it sees the others'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanovl.parallelisms.collectives import gather
from nanovl.spec import Batch

# n ranks, B batch, T tokens of this rank (queries), S tokens of the whole row, C tokens of a chunk


@dataclass(frozen=True)
class SequenceCut:
    """A row in equal chunks, each of one rank of the context group."""

    rank: int = 0
    degree: int = 1
    headtail: bool = False
    """Two chunks a rank, number r from the head and number r from the tail: a causal query sees what is before it, so
    one with much to see goes with one with little. Otherwise one chunk a rank."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of this rank's chunks."""
        return self.chunks_of(self.rank)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Numbers of `rank`'s chunks, in the order it holds them."""
        return (rank, 2 * self.degree - 1 - rank) if self.headtail else (rank,)

    def cut(self, batch: Batch) -> Batch:
        """This rank's tokens of whole rows."""
        if self.degree == 1:
            return batch
        return {key: self.mine(value) for key, value in batch.items()}

    def mine(self, whole_BS: Tensor) -> Tensor:
        """This rank's tokens [B, T, ...] of whole rows."""
        number = self.degree * len(self.chunks)
        assert whole_BS.shape[1] % number == 0, f"{whole_BS.shape[1]} tokens in {number} chunks"
        chunks = whole_BS.chunk(number, dim=1)
        return torch.cat([chunks[number] for number in self.chunks], dim=1)

    def places(self, num_tokens: int, device: torch.device) -> Tensor:
        """Place in the row of each of this rank's `num_tokens` tokens."""
        return self.mine(torch.arange(self.degree * num_tokens, device=device)[None])[0]


def whole_row(x_BT: Tensor, cut: SequenceCut, group: dist.ProcessGroup) -> Tensor:
    """[B, T, ...] of every rank -> [B, S, ...], in the order of the row; gradients are summed back to their owners."""
    parts_nBT = gather(x_BT[None], 0, group)
    if not cut.headtail:
        return parts_nBT.movedim(0, 1).flatten(1, 2)
    head_nBC, tail_nBC = parts_nBT.chunk(2, dim=2)
    return torch.cat((head_nBC, tail_nBC.flip(0))).movedim(0, 1).flatten(1, 2)


def visible_between(
    place_T: Tensor, place_S: Tensor, window: int | None, doc_BT: Tensor | None, doc_BS: Tensor | None
) -> Tensor:
    """Which of some keys each of some queries may see, [B or 1, 1, T, S]: itself and earlier ones, in window and
    document. Places are those in the row; without documents a row is one."""
    distance_TS = place_T[:, None] - place_S[None, :]
    mask = distance_TS >= 0
    if window is not None:
        mask = mask & (distance_TS < window)
    mask = mask[None, None]
    if doc_BT is None or doc_BS is None:
        return mask
    return mask & (doc_BT[:, None, :, None] == doc_BS[:, None, None, :])
