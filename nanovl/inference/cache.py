"""Keys, values and last embeddings of running requests, and the children of a model that keep them.

The model's own code runs unchanged: during a forward of the engine every `AttentionCore` is replaced by a
`CachedCore`, every `SparseCore` by a `CachedSparseCore` and every `PreviousToken` by a `CachedPrevious`, found by
class wherever they sit; those of Gated DeltaNet by what states.py has. Another child that looks at earlier tokens needs
its cached form in `cached_form`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nanovl.inference.request import RequestError
from nanovl.inference.states import State, grown, state_of
from nanovl.models.blocks.attention import AttentionCore, AttentionMeta, attend
from nanovl.models.blocks.indexer import Index, chosen
from nanovl.models.blocks.sparse_core import SparseCore
from nanovl.models.nanochat import PreviousToken
from nanovl.spec import serving_modules

# B rows of a forward, T their tokens (right-padded), N all tokens but the padding, S key places, D channels,
# H query heads, K key/value heads

PLACES_MULTIPLE = 64
"""Places are reserved in this multiple, so that growing prompts do not copy the cache each time."""


@dataclass(frozen=True)
class Keys:
    """The keys that one forward reads: places `first` to `stop` of its slots."""

    first: int
    stop: int
    mask: Tensor | None
    """True where a query may look, [B, 1, T, S]; None = everywhere, or causally."""
    is_causal: bool = False


class Feed:
    """What one forward feeds: row b brings `counts[b]` tokens for slot `slots[b]`, from place `starts[b]` on.

    Shorter rows are padded on the right. A padded token repeats the place of its row's last one: so it sees
    written keys only; it is not written itself, and nobody reads what it computes.
    """

    def __init__(self, slots: list[int], starts: list[int], counts: list[int], device: torch.device) -> None:
        self.starts, self.counts = starts, counts
        self.stop = max(start + count for start, count in zip(starts, counts, strict=True))
        # made on the CPU, so that no size of theirs is asked of a GPU
        slots_B, starts_B1, counts_B1 = (
            torch.tensor(slots),
            torch.tensor(starts)[:, None],
            torch.tensor(counts)[:, None],
        )
        column_T = torch.arange(max(counts))
        positions_BT = starts_B1 + column_T.minimum(counts_B1 - 1)
        rows_N, columns_N = (column_T < counts_B1).nonzero(as_tuple=True)
        self.positions_BT = positions_BT.to(device)
        self.slots_N, self.places_N = slots_B[rows_N].to(device), positions_BT[rows_N, columns_N].to(device)
        self.last = (torch.arange(len(slots), device=device), counts_B1[:, 0].to(device) - 1)
        """Index of every row's last token in a [B, T, ...] tensor."""
        # adjacent slots are read in place, others are gathered
        together = slice(slots[0], slots[0] + len(slots))
        self.slots = together if slots == [*range(together.start, together.stop)] else slots_B.to(device)
        self._valid = (rows_N.to(device), columns_N.to(device)) if min(counts) < max(counts) else None
        self._keys: dict[int | None, Keys] = {}

    def without_padding(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...], row by row."""
        return x_BT.flatten(0, 1) if self._valid is None else x_BT[self._valid]

    def keys(self, window: int | None) -> Keys:
        """What queries with `window` may read; made once for all layers that share it."""
        if window not in self._keys:
            self._keys[window] = self._make_keys(window)
        return self._keys[window]

    def _make_keys(self, window: int | None) -> Keys:
        num_tokens = max(self.counts)
        first = 0 if window is None else max(0, min(self.starts) - window + 1)
        together = self._valid is None and min(self.starts) == max(self.starts)
        if together and num_tokens == 1:
            return Keys(first, self.stop, None)
        if together and self.starts[0] == 0 and (window is None or window >= num_tokens):
            return Keys(0, self.stop, None, is_causal=True)
        key_S = torch.arange(first, self.stop, device=self.positions_BT.device)
        distance_BTS = self.positions_BT[..., None] - key_S
        mask_BTS = distance_BTS >= 0
        if window is not None:
            mask_BTS &= distance_BTS < window
        return Keys(first, self.stop, mask_BTS[:, None])


@dataclass(frozen=True)
class CacheMemory:
    """What the cache takes: `slots` x `places` tokens of `bytes_per_token`, and states, allocated so far."""

    slots: int
    places: int
    bytes_per_token: int
    """Keys and values of one token in all layers."""
    bytes_per_slot: int = 0
    """What layers keep of a request in a fixed size."""

    @property
    def bytes(self) -> int:
        return self.slots * (self.places * self.bytes_per_token + self.bytes_per_slot)

    def __str__(self) -> str:
        states = f" + {self.bytes_per_slot:,} bytes" if self.bytes_per_slot else ""
        tokens = f"{self.places} tokens x {self.bytes_per_token:,} bytes"
        slot = f"({tokens}{states})" if states else tokens
        return f"{self.bytes / 2**20:.1f} MiB: {self.slots} slots x {slot}"


class KVCache:
    """All that a model remembers of its running requests, one slot each.

    Memory grows to what the admitted requests can need, and stays. Its dtype and device are those of the keys
    that arrive, since FSDP's compute dtype shows nowhere else.
    """

    def __init__(self, model: nn.Module) -> None:
        self.slots = self.places = 0
        self.feed: Feed | None = None
        self._weights_dtype = next(model.parameters()).dtype
        self._seats = [
            (parent, name, child, cached)
            for parent in serving_modules(model)
            for name, child in parent.named_children()
            if (cached := cached_form(child, self)) is not None
        ]
        self._cores = [cached for *_, cached in self._seats if isinstance(cached, CachedCore)]
        self._states = [cached for *_, cached in self._seats if isinstance(cached, State)]
        if not self._cores and not self._states:
            name = type(model).__name__
            raise RequestError(
                f"Engine: {name} has no AttentionCore; give it a model built of nanovl's blocks"
            )

    def reserve(self, slots: int, places: int) -> None:
        """Have room for `slots` requests of `places` tokens from the next forward on."""
        self.slots = max(self.slots, slots)
        self.places = max(self.places, -(-places // PLACES_MULTIPLE) * PLACES_MULTIPLE)

    def clear(self, slot: int) -> None:
        """Forget what `slot` holds. Nothing may stay: 0 times a masked value is NaN if that is inf."""
        for *_, cached in self._seats:
            for store in cached.stores():
                if slot < len(store):
                    store[slot].zero_()

    @contextmanager
    def installed(self, feed: Feed) -> Iterator[None]:
        """The model remembers, for one forward of `feed`; then every child is its own again."""
        self.feed = feed
        try:
            for parent, name, _, cached in self._seats:
                setattr(parent, name, cached)
            yield
        finally:
            for parent, name, child, _ in self._seats:
                setattr(parent, name, child)
            self.feed = None

    def memory(self) -> CacheMemory:
        """What is reserved; before the first forward, as if computed in the dtype of the weights."""
        per_token = sum(core.bytes_per_token(self._weights_dtype) for core in self._cores)
        per_slot = sum(state.bytes_per_slot(self._weights_dtype) for state in self._states)
        return CacheMemory(self.slots, self.places, per_token, per_slot)


class CachedCore(nn.Module):
    """AttentionCore over the keys and values of each row's slot, the new ones included."""

    def __init__(self, core: AttentionCore, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.window = core.window
        self.num_key_value_heads = core.num_key_value_heads
        self.channels = core.head_dim + core.value_dim
        self.scores = core.scores.uncompiled
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def forward(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        meta: AttentionMeta,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """-> [B, T, H, D]."""
        feed, keys, k_BSKD, v_BSKD = self.recall(k_BTKD, v_BTKD)
        batch, tokens, heads, head_dim = q_BTHD.shape
        how = partial(attend, scores=self.scores, heat_BT=self.scores.heat(feed.positions_BT))
        if tokens > 1 or sinks_H is not None:
            return how(q_BTHD, k_BSKD, v_BSKD, keys.mask, is_causal=keys.is_causal, sinks_H=sinks_H)
        # the query heads of one key head, taken for that many tokens, read each key once instead of once each
        grouped = q_BTHD.view(batch, k_BSKD.shape[2], -1, head_dim).transpose(1, 2)
        out = how(grouped, k_BSKD, v_BSKD, keys.mask)
        return out.transpose(1, 2).reshape(batch, 1, heads, -1)

    def recall(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Feed, Keys, Tensor, Tensor]:
        """Keep what this forward brings; its feed, and which keys and values [B, S, ...] its rows read."""
        feed = self.cache.feed
        assert feed is not None, "a cached core outside of KVCache.installed"
        keys = feed.keys(self.window)
        self.k, k_BSKD = self._kept(self.k, k_BTKD, feed, keys)
        self.v, v_BSKD = self._kept(self.v, v_BTKD, feed, keys)
        return feed, keys, k_BSKD, v_BSKD

    def _kept(self, store: Tensor | None, x_BT: Tensor, feed: Feed, keys: Keys) -> tuple[Tensor, Tensor]:
        """`store` with this forward's tokens in it, and what of it is read."""
        store = grown(store, (self.cache.slots, self.cache.places, *x_BT.shape[2:]), x_BT)
        store[feed.slots_N, feed.places_N] = feed.without_padding(x_BT)
        return store, store[feed.slots, keys.first : keys.stop]

    def stores(self) -> list[Tensor]:
        """Tensors [slots, ...] that hold what was seen."""
        return [store for store in (self.k, self.v) if store is not None]

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Of keys and values; `dtype` where none have arrived yet."""
        if self.k is None or self.v is None:
            return self.num_key_value_heads * self.channels * dtype.itemsize
        return self.k[0, 0].nbytes + self.v[0, 0].nbytes


class CachedSparseCore(CachedCore):
    """SparseCore that also remembers what keys are scored by."""

    def __init__(self, core: SparseCore, cache: KVCache) -> None:
        super().__init__(core, cache)
        self.topk, self.index_channels = core.indexer.index_topk, core.indexer.index_head_dim
        self.index_k: Tensor | None = None

    def forward(  # type: ignore[override]
        self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, meta: AttentionMeta, index: Index
    ) -> Tensor:
        """-> [B, T, H, D]."""
        feed, keys, k_BSHD, v_BSHD = self.recall(k_BTHD, v_BTHD)
        self.index_k, index_k_BSD = self._kept(self.index_k, index.k_BSD, feed, keys)
        mask = keys.mask
        if mask is None and not keys.is_causal:
            mask = torch.ones(1, 1, 1, keys.stop - keys.first, dtype=torch.bool, device=q_BTHD.device)
        mask = chosen(index._replace(k_BSD=index_k_BSD), mask, self.topk)
        return attend(q_BTHD, k_BSHD, v_BSHD, mask, is_causal=mask is None, scores=self.scores)

    def stores(self) -> list[Tensor]:
        """Tensors [slots, ...] that hold what was seen."""
        return [*super().stores(), *([] if self.index_k is None else [self.index_k])]

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Of keys, values and what keys are scored by; `dtype` where none have arrived yet."""
        index = self.index_channels * dtype.itemsize if self.index_k is None else self.index_k[0, 0].nbytes
        return super().bytes_per_token(dtype) + index


class CachedPrevious(nn.Module):
    """PreviousToken that remembers the last embedding of every slot."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.last: Tensor | None = None

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        feed = self.cache.feed
        assert feed is not None, "a cached child outside of KVCache.installed"
        self.last = grown(self.last, (self.cache.slots, x_BTD.shape[-1]), x_BTD)
        before_BTD = torch.cat((self.last[feed.slots][:, None], x_BTD[:, :-1]), dim=1)
        self.last[feed.slots] = x_BTD[feed.last]
        return before_BTD * (positions_BT > 0)[..., None]

    def stores(self) -> list[Tensor]:
        """Tensors [slots, ...] that hold what was seen."""
        return [] if self.last is None else [self.last]


def cached_form(child: nn.Module, cache: KVCache) -> CachedCore | CachedPrevious | State | None:
    """What stands for `child` in the engine; None where it looks at no other token."""
    if isinstance(child, SparseCore):
        return CachedSparseCore(child, cache)
    if isinstance(child, AttentionCore):
        return CachedCore(child, cache)
    return CachedPrevious(cache) if isinstance(child, PreviousToken) else state_of(child, cache)
