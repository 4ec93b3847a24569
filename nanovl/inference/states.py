"""What layers remember of a request in a fixed size, however long it is: cached forms of Gated DeltaNet's children."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nanovl.models.blocks.delta_rule import DeltaRule, chunked, recurrent
from nanovl.models.blocks.gated_delta_net import EarlierTokens

if TYPE_CHECKING:
    from nanovl.inference.cache import Feed, KVCache

# B rows of a forward, T their tokens (right-padded), H heads, X key channels, Y value channels, J earlier tokens,
# Z channels


class State(nn.Module):
    """One tensor a slot; zero in a slot that has seen nothing."""

    def __init__(self, cache: KVCache, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.cache = cache
        self.shape = shape
        self.store: Tensor | None = None

    def recall(self, like: Tensor) -> tuple[Feed, Tensor]:
        """This forward's feed, and the states [B, ...] of its rows; new memory is as `like`."""
        feed = self.cache.current
        self.store = grown(self.store, (self.cache.slots, *self.shape), like)
        return feed, self.store[feed.slots]

    def keep(self, feed: Feed, state: Tensor) -> None:
        """The states of this forward's rows from now on."""
        assert self.store is not None
        self.store[feed.slots] = state

    def stores(self) -> list[Tensor]:
        """Tensors [slots, ...] that hold what was seen."""
        return [] if self.store is None else [self.store]

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Of a state; `dtype` where none has arrived yet."""
        return prod(self.shape) * (dtype if self.store is None else self.store.dtype).itemsize


class CachedEarlier(State):
    """EarlierTokens that remembers each slot's last ones."""

    def __init__(self, earlier: EarlierTokens, cache: KVCache) -> None:
        super().__init__(cache, (earlier.count, earlier.channels))
        self.count = earlier.count

    def forward(self, x_BTZ: Tensor) -> Tensor:
        feed, before_BJZ = self.recall(x_BTZ)
        x_BTZ = torch.cat((before_BJZ, x_BTZ), dim=1)
        row_B, last_B = feed.last
        # a row's last tokens stand before its padding
        index_BJ = last_B[:, None] + 1 + torch.arange(self.count, device=x_BTZ.device)
        self.keep(feed, x_BTZ[row_B[:, None], index_BJ])
        return x_BTZ


class CachedDeltaRule(State):
    """DeltaRule that goes on from each slot's matrices."""

    def __init__(self, rule: DeltaRule, cache: KVCache) -> None:
        super().__init__(cache, rule.state_shape)

    def forward(
        self, q_BTHX: Tensor, k_BTHX: Tensor, v_BTHY: Tensor, g_BTH: Tensor, beta_BTH: Tensor
    ) -> Tensor:
        """-> [B, T, H, Y] float32."""
        tokens = k_BTHX.shape[1]
        feed, state_BHXY = self.recall(k_BTHX.float())
        padding_BT1 = (torch.arange(tokens, device=g_BTH.device) > feed.last[1][:, None])[..., None]
        # padding neither decays the memory nor writes to it
        g_BTH, beta_BTH = g_BTH.masked_fill(padding_BT1, 0.0), beta_BTH.masked_fill(padding_BT1, 0.0)
        rule = recurrent if tokens == 1 else chunked
        out_BTHY, state_BHXY = rule(q_BTHX, k_BTHX, v_BTHY, g_BTH, beta_BTH, state_BHXY)
        self.keep(feed, state_BHXY)
        return out_BTHY

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        """Of a state, which is float32 whatever `dtype` the rest is."""
        return super().bytes_per_slot(torch.float32)


def state_of(child: nn.Module, cache: KVCache) -> State | None:
    """What stands for `child` in the engine; None where it is none of these."""
    if isinstance(child, EarlierTokens):
        return CachedEarlier(child, cache)
    return CachedDeltaRule(child, cache) if isinstance(child, DeltaRule) else None


def grown(store: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`store` with room for `shape`, what it holds kept and the rest 0; new memory is as `like`."""
    if store is not None and all(have >= want for have, want in zip(store.shape, shape, strict=True)):
        return store
    larger = like.new_zeros(shape)
    if store is not None:
        larger[tuple(slice(size) for size in store.shape)] = store
    return larger
