from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nanovl.inference.cache import CachedCore, Feed, KVCache
from nanovl.inference.request import RequestError
from nanovl.models.blocks.attention import AttentionCore
from nanovl.models.nanochat import PreviousToken

CPU = torch.device("cpu")
BuildModel = Callable[..., nn.Module]


def feed(slots: list[int], starts: list[int], counts: list[int]) -> Feed:
    return Feed(slots, starts, counts, CPU)


def seen(mask: Tensor | None, first: int = 0) -> list[list[list[int]]]:
    """Key places by row and query."""
    assert mask is not None
    return [[[first + s for s in query.nonzero()[:, 0].tolist()] for query in row[0]] for row in mask]


def test_a_shorter_prompt_is_padded_with_the_place_of_its_last_token() -> None:
    prompts = feed([0, 1], [0, 4], [3, 1])
    assert prompts.positions_BT.tolist() == [[0, 1, 2], [4, 4, 4]]
    assert prompts.slots_N.tolist() == [0, 0, 0, 1]
    assert prompts.places_N.tolist() == [0, 1, 2, 4]
    values = torch.arange(6).view(2, 3)
    assert prompts.without_padding(values).tolist() == [0, 1, 2, 3]
    assert values[prompts.last].tolist() == [2, 3]


def test_queries_see_their_past_inside_the_window() -> None:
    prompts = feed([0, 1], [0, 4], [3, 1])
    assert seen(prompts.keys(None).mask) == [[[0], [0, 1], [0, 1, 2]], [[0, 1, 2, 3, 4]] * 3]
    assert seen(prompts.keys(2).mask) == [[[0], [0, 1], [1, 2]], [[3, 4]] * 3]
    assert seen(prompts.keys(1).mask) == [[[0], [1], [2]], [[4]] * 3]


def test_a_window_reads_only_the_keys_that_some_query_sees() -> None:
    one_token_each = feed([0, 1], [7, 9], [1, 1])
    keys = one_token_each.keys(3)
    assert (keys.first, keys.stop) == (5, 10)
    assert seen(keys.mask, keys.first) == [[[5, 6, 7]], [[7, 8, 9]]]


def test_no_mask_is_made_where_none_is_needed() -> None:
    together = feed([0, 1], [9, 9], [1, 1])
    assert (together.keys(None).mask, together.keys(None).first) == (None, 0)
    assert (together.keys(4).mask, together.keys(4).first, together.keys(4).stop) == (None, 6, 10)
    fresh = feed([0, 1], [0, 0], [6, 6])
    assert fresh.keys(None).is_causal
    assert fresh.keys(6).is_causal
    assert not fresh.keys(5).is_causal
    assert not feed([0], [2], [6]).keys(None).is_causal


def test_neighbouring_slots_are_read_in_place() -> None:
    assert feed([2, 3], [0, 0], [1, 1]).slots == slice(2, 4)
    apart = feed([0, 3], [0, 0], [1, 1]).slots
    assert isinstance(apart, Tensor)
    assert apart.tolist() == [0, 3]


def run(model: nn.Module, cache: KVCache, batch: Feed, tokens: list[list[int]]) -> Tensor:
    with torch.no_grad(), cache.installed(batch):
        return model(torch.tensor(tokens), batch.positions_BT)


def test_padding_is_neither_written_nor_read(build_model: BuildModel) -> None:
    model = build_model("nanochat")
    cache = KVCache(model)
    cache.reserve(2, 10)
    logits = run(model, cache, feed([0, 1], [0, 0], [2, 6]), [[5, 7, 60, 61, 62, 63], [1, 2, 3, 4, 5, 6]])
    cores = [cached for *_, cached in cache._seats if isinstance(cached, CachedCore)]
    assert len(cores) == 4
    for core in cores:
        keys, _ = core.stores()
        assert (keys[0, :2] != 0).any(dim=(1, 2)).all()
        assert (keys[0, 2:] == 0).all()
        assert (keys[1, 6:] == 0).all()
    then = run(model, cache, feed([0, 1], [2, 6], [1, 1]), [[9], [9]])
    with torch.no_grad():
        alone = model(torch.tensor([[5, 7, 9]]))
    assert (logits[0, :2] - alone[0, :2]).abs().max() < 1e-5
    assert (then[0, 0] - alone[0, 2]).abs().max() < 1e-5


def test_a_prompt_in_chunks_equals_the_prompt_at_once(build_model: BuildModel) -> None:
    model = build_model("nanochat")
    cache = KVCache(model)
    cache.reserve(1, 30)
    tokens = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    parts = [
        run(model, cache, feed([0], [start], [stop - start]), [tokens[start:stop]])
        for start, stop in ((0, 11), (11, 12), (12, 30))
    ]
    with torch.no_grad():
        whole = model(torch.tensor([tokens]))
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 2e-5


def test_cleared_slots_are_zero_and_others_stay(build_model: BuildModel) -> None:
    model = build_model("nanochat")
    cache = KVCache(model)
    cache.reserve(2, 4)
    run(model, cache, feed([0, 1], [0, 0], [4, 4]), [[1, 2, 3, 4], [5, 6, 7, 8]])
    cache.clear(0)
    stores = [store for *_, cached in cache._seats for store in cached.stores()]
    assert len(stores) == 2 * 4 + 1
    assert all((store[0] == 0).all() and (store[1] != 0).any() for store in stores)


def test_growing_keeps_what_is_cached(build_model: BuildModel) -> None:
    model = build_model("nanochat")
    cache = KVCache(model)
    cache.reserve(1, 60)
    tokens = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    run(model, cache, feed([0], [0], [60]), [tokens[:60]])
    assert cache.memory().places == 64
    cache.reserve(3, 100)
    last = run(model, cache, feed([0], [60], [40]), [tokens[60:]])
    assert (cache.memory().slots, cache.memory().places) == (3, 128)
    with torch.no_grad():
        assert (last - model(torch.tensor([tokens]))[:, 60:]).abs().max() < 2e-5


def test_every_child_is_its_own_again_even_after_an_error(build_model: BuildModel) -> None:
    model = build_model("nanochat")
    before = dict(model.named_modules())
    cache = KVCache(model)
    cache.reserve(1, 4)
    with cache.installed(feed([0], [0], [1])):
        kinds = [type(module) for module in model.modules()]
    assert AttentionCore not in kinds
    assert PreviousToken not in kinds
    with pytest.raises(IndexError):
        run(model, cache, feed([0], [0], [1]), [[99999]])
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())


def test_memory_is_reported(build_model: BuildModel) -> None:
    model = build_model("nanochat").bfloat16()
    cache = KVCache(model)
    # 4 layers x keys and values x 2 heads x 16 channels x 2 bytes
    assert cache.memory().bytes_per_token == 4 * 2 * 2 * 16 * 2
    cache.reserve(3, 65)
    run(model, cache, feed([0], [0], [1]), [[1]])
    memory = cache.memory()
    assert (memory.slots, memory.places, memory.bytes_per_token) == (3, 128, 512)
    stores = [cached.store for cached in cache._kept]
    assert memory.bytes == sum(store.nbytes for store in stores) == 3 * 128 * 512
    assert str(memory) == "0.2 MiB: 3 slots x 128 tokens x 512 bytes"


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"Linear has no AttentionCore; give it a model built of nanovl's blocks"
    ):
        KVCache(nn.Linear(2, 2))
