"""Time of collectives, by hand."""

from __future__ import annotations

import pytest

from nanovl.device import PEAK_FLOPS
from nanovl.planning.hardware import GPUS, LINK_EFFICIENCY, seconds

H100 = GPUS["NVIDIA H100 80GB HBM3"]
LINK, NETWORK = 450e9 * LINK_EFFICIENCY, 50e9 * LINK_EFFICIENCY


def test_every_gpu_with_a_known_peak_can_be_planned() -> None:
    assert GPUS.keys() == PEAK_FLOPS.keys()


@pytest.mark.parametrize(
    ("what", "ranks", "expected"),
    [
        ("all-gather", range(8), 7 / 8 / LINK),
        ("reduce-scatter", range(8), 7 / 8 / LINK),
        ("all-to-all", range(4), 3 / 4 / LINK),
        ("all-reduce", range(8), 2 * 7 / 8 / LINK),
        ("send", (0, 8), 1 / NETWORK),
        ("receive", (0, 8), 0.0),
        # one rank of each node, then all 8 of each, which feed the network together
        ("all-reduce", range(0, 64, 8), 2 * 7 / 8 / NETWORK),
        ("all-gather", range(64), 63 / 64 / (8 * NETWORK)),
    ],
)
def test_seconds_of_a_gigabyte(what: str, ranks: range, expected: float) -> None:
    assert seconds(what, 1e9, list(ranks), H100, 8) == pytest.approx(1e9 * expected)  # type: ignore[arg-type]
