from __future__ import annotations

from nanovl.data.order import digest, permutation, shuffled

MASK = 2**64 - 1


def splitmix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_permutation_sorts_by_splitmix64_of_the_digest():
    start = digest(7, "units", 0)
    keys = [splitmix64((start + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in range(100)]
    assert permutation(100, 7, "units", 0).tolist() == sorted(range(100), key=lambda i: keys[i])


def test_orders_are_those_that_runs_were_made_with():
    # golden: a change here changes the data order of every run, and breaks every resume
    assert permutation(10, 1, "a").tolist() == [0, 1, 8, 7, 9, 2, 3, 6, 5, 4]
    assert list(shuffled("abcdef", 3, window=3)) == list("cbafde")


def test_every_part_of_the_seed_changes_the_order():
    orders = {tuple(permutation(50, *seed)) for seed in ((1, 2), (1, 3), (2, 2), (12,), ("1", 2))}
    assert len(orders) == 5


def test_shuffled_keeps_every_item_within_its_window():
    items = list(shuffled(range(10), "seed", window=4))
    assert [sorted(items[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(shuffled([], "seed")) == []
