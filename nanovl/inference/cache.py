"""Keys, values and last embeddings of running requests, and the children of a model that keep them.

The model's own code runs unchanged: during a forward of the engine every `AttentionCore` is replaced by a
`CachedCore` and every `PreviousToken` by a `CachedPrevious`, found by class wherever they sit; those of Gated DeltaNet
by what states.py has. Latent attention remembers one child earlier: `CachedLatents` stands for its `Latents`, and its
core gets the keys of all tokens. Another child that looks at earlier tokens needs its cached form in `cached_form`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from nanovl.inference.request import RequestError
from nanovl.inference.states import State, grown, state_of
from nanovl.models.blocks.attention import AttentionCore, AttentionMeta, attend
from nanovl.models.blocks.indexer import Index, chosen
from nanovl.models.blocks.mla import LatentAttention, Latents
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
    """Keys and values of one token in all layers, or the latents they come from."""
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
            if (cached := cached_form(child, parent, self)) is not None
        ]
        children = [cached for *_, cached in self._seats]
        self._kept = [kept for cached in children if isinstance(cached, Remembering) for kept in cached.kept]
        self._states = [cached for cached in children if isinstance(cached, State)]
        if not self._kept and not self._states:
            name = type(model).__name__
            raise RequestError(
                f"Engine: {name} has no AttentionCore; give it a model built of nanovl's blocks"
            )

    @property
    def current(self) -> Feed:
        """What the forward that is running feeds."""
        assert self.feed is not None, "a cached child outside of KVCache.installed"
        return self.feed

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
        per_token = sum(kept.bytes_per_token(self._weights_dtype) for kept in self._kept)
        per_slot = sum(state.bytes_per_slot(self._weights_dtype) for state in self._states)
        return CacheMemory(self.slots, self.places, per_token, per_slot)


class Kept:
    """Something of every token of every slot, [slots, places, ...]."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        """Of one token."""
        self.store: Tensor | None = None

    def recall(self, x_BT: Tensor, cache: KVCache, window: int | None) -> Tensor:
        """Keep what this forward brings, [B, T, ...], and return all that its rows may read, [B, S, ...]."""
        feed = cache.current
        keys = feed.keys(window)
        self.store = grown(self.store, (cache.slots, cache.places, *x_BT.shape[2:]), x_BT)
        self.store[feed.slots_N, feed.places_N] = feed.without_padding(x_BT)
        return self.store[feed.slots, keys.first : keys.stop]

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """`dtype` where none has arrived yet."""
        return prod(self.shape) * (dtype if self.store is None else self.store.dtype).itemsize


class Remembering(nn.Module):
    """A child that keeps something of every token, for queries with `window`."""

    def __init__(self, cache: KVCache, window: int | None, *kept: Kept) -> None:
        super().__init__()
        self.cache = cache
        self.window = window
        self.kept = kept

    def recall(self, *new: Tensor) -> list[Tensor]:
        """Of each thing that is kept, all that this forward's rows may read, what is new included."""
        both = zip(self.kept, new, strict=True)
        return [kept.recall(x_BT, self.cache, self.window) for kept, x_BT in both]

    def stores(self) -> list[Tensor]:
        """Tensors [slots, ...] that hold what was seen."""
        return [kept.store for kept in self.kept if kept.store is not None]


class CachedCore(Remembering):
    """AttentionCore over keys and values of all tokens so far; where nothing is kept, its layer brings them all."""

    def __init__(self, core: AttentionCore, cache: KVCache, *kept: Kept) -> None:
        super().__init__(cache, core.window, *kept)
        self.scores = core.scores.uncompiled

    def forward(
        self,
        q_BTHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        meta: AttentionMeta,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """-> [B, T, H, D]."""
        if self.kept:
            k_BSKD, v_BSKD = self.recall(k_BSKD, v_BSKD)
        feed = self.cache.current
        keys = feed.keys(self.window)
        batch, tokens, heads, head_dim = q_BTHD.shape
        how = partial(attend, scores=self.scores, heat_BT=self.scores.heat(feed.positions_BT))
        if tokens > 1 or sinks_H is not None:
            return how(q_BTHD, k_BSKD, v_BSKD, keys.mask, is_causal=keys.is_causal, sinks_H=sinks_H)
        # the query heads of one key head, taken for that many tokens, read each key once instead of once each
        grouped = q_BTHD.view(batch, k_BSKD.shape[2], -1, head_dim).transpose(1, 2)
        out = how(grouped, k_BSKD, v_BSKD, keys.mask)
        return out.transpose(1, 2).reshape(batch, 1, heads, -1)


class CachedLatents(Remembering):
    """Latents of latent attention, remembered."""

    def __init__(self, latents: Latents, cache: KVCache) -> None:
        super().__init__(cache, latents.window, Kept(latents.channels))

    def forward(self, kv_BTL: Tensor) -> Tensor:
        """-> [B, S, L]."""
        (kv_BSL,) = self.recall(kv_BTL)
        return kv_BSL


class CachedSparseCore(CachedCore):
    """SparseCore that remembers what keys are scored by."""

    def __init__(self, core: SparseCore, cache: KVCache) -> None:
        super().__init__(core, cache, Kept(core.indexer.index_head_dim))
        self.topk = core.indexer.index_topk

    def forward(  # type: ignore[override]
        self, q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, meta: AttentionMeta, index: Index
    ) -> Tensor:
        """-> [B, T, H, D]."""
        (index_k_BSD,) = self.recall(index.k_BSD)
        keys = self.cache.current.keys(self.window)
        mask = keys.mask
        if mask is None and not keys.is_causal:
            mask = torch.ones(1, 1, 1, keys.stop - keys.first, dtype=torch.bool, device=q_BTHD.device)
        mask = chosen(index._replace(k_BSD=index_k_BSD), mask, self.topk)
        return attend(q_BTHD, k_BSKD, v_BSKD, mask, is_causal=mask is None, scores=self.scores)


class CachedPrevious(nn.Module):
    """PreviousToken that remembers the last embedding of every slot."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.last: Tensor | None = None

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        feed = self.cache.current
        self.last = grown(self.last, (self.cache.slots, x_BTD.shape[-1]), x_BTD)
        before_BTD = torch.cat((self.last[feed.slots][:, None], x_BTD[:, :-1]), dim=1)
        self.last[feed.slots] = x_BTD[feed.last]
        return before_BTD * (positions_BT > 0)[..., None]

    def stores(self) -> list[Tensor]:
        """Tensors [slots, ...] that hold what was seen."""
        return [] if self.last is None else [self.last]


def cached_form(
    child: nn.Module, parent: nn.Module, cache: KVCache
) -> Remembering | CachedPrevious | State | None:
    """What stands for `child` of `parent` in the engine; None where it looks at no other token."""
    if isinstance(child, Latents):
        return CachedLatents(child, cache)
    if isinstance(child, SparseCore):  # latent attention's
        return CachedSparseCore(child, cache)
    if isinstance(child, AttentionCore):
        heads = child.num_key_value_heads
        keys_and_values = Kept(heads, child.head_dim), Kept(heads, child.value_dim)
        return CachedCore(child, cache, *(() if isinstance(parent, LatentAttention) else keys_and_values))
    return CachedPrevious(cache) if isinstance(child, PreviousToken) else state_of(child, cache)
