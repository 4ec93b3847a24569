"""GPUs as their vendors describe them; nothing here is measured."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from nanovl.device import PEAK_FLOPS
from nanovl.errors import ConfigError
from nanovl.planning.ledger import Collective

LINK_EFFICIENCY = 0.8
"""Share of a link's rate that collectives reach; assumed, not measured."""
USABLE_MEMORY = 0.92
"""Share of a GPU's memory that is left for tensors; CUDA, NCCL and fragmentation take the rest. Assumed."""


@dataclass(frozen=True)
class Gpu:
    """One GPU and how it reaches others; rates a second, links in one direction."""

    name: str
    capability: tuple[int, int]
    """CUDA's compute capability, by which torch chooses kernels."""
    flops: float
    """Dense bfloat16."""
    memory_gib: float
    memory_rate: float
    """Bytes between the GPU and its own memory."""
    link_rate: float
    """Bytes to other GPUs of the node: NVLink, or PCIe where there is none."""
    network_rate: float
    """Bytes to other nodes, its share of the node's network."""


def _gpu(
    name: str, capability: str, memory_gib: float, memory_tb: float, link_gb: float, network_gb: float
) -> Gpu:
    major, minor = map(int, capability.split("."))
    rates = (memory_tb * 1e12, link_gb * 1e9, network_gb * 1e9)
    return Gpu(name, (major, minor), PEAK_FLOPS[name], memory_gib, *rates)


# data sheets of the GPUs, half of NVLink's rate of both directions; network of the vendor's node of 8: DGX H100, H200
# and B200 400 Gbit/s a GPU, DGX A100 200 Gbit/s. PCIe cards have no such node: 200 Gbit/s is assumed
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("NVIDIA H100 80GB HBM3", "9.0", 80, 3.35, 450, 50),
        _gpu("NVIDIA H100 PCIe", "9.0", 80, 2.0, 64, 25),
        _gpu("NVIDIA H200", "9.0", 141, 4.8, 450, 50),
        _gpu("NVIDIA H200 NVL", "9.0", 141, 4.8, 450, 25),
        _gpu("NVIDIA B200", "10.0", 180, 8.0, 900, 50),
        _gpu("NVIDIA A100-SXM4-40GB", "8.0", 40, 1.555, 300, 25),
        _gpu("NVIDIA A100-SXM4-80GB", "8.0", 80, 2.039, 300, 25),
        _gpu("NVIDIA A100 80GB PCIe", "8.0", 80, 1.935, 32, 25),
        _gpu("NVIDIA L40S", "8.9", 48, 0.864, 32, 25),
        _gpu("NVIDIA GeForce RTX 4090", "8.9", 24, 1.008, 32, 25),
        _gpu("NVIDIA GeForce RTX 5090", "12.0", 32, 1.792, 64, 25),
    )
}


SHORT = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h200": "NVIDIA H200",
    "h200-nvl": "NVIDIA H200 NVL",
    "b200": "NVIDIA B200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a100-pcie": "NVIDIA A100 80GB PCIe",
    "l40s": "NVIDIA L40S",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx5090": "NVIDIA GeForce RTX 5090",
}
"""What people call them."""


def gpu_called(name: str) -> Gpu:
    """The GPU of a short name or of the one that torch reports, in any case. Raises ConfigError with all names."""
    names = {**{known.lower(): known for known in GPUS}, **SHORT}
    if name.lower() in names:
        return GPUS[names[name.lower()]]
    near = difflib.get_close_matches(name.lower(), names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = ", ".join(f"{short} ({full})" for short, full in SHORT.items())
    raise ConfigError(f"--gpu = {name!r}: its rates are not known; {hint}There are {known}")


def seconds(what: Collective, size: float, ranks: Sequence[int], gpu: Gpu, gpus_per_node: int) -> float:
    """Time of collectives over `ranks` of the job whose largest tensors add up to `size` bytes.

    In a ring every rank passes on all but its own part. Over several nodes the slowest link is the network, which
    all ranks on a node feed together. What is received comes while as much is sent.
    """
    others = len(ranks) - 1
    share = {"send": 1.0, "receive": 0.0, "broadcast": 1.0}.get(what, others / len(ranks))
    moved = size * share * (2 if what == "all-reduce" else 1)
    together = [len(list(nodes)) for _, nodes in groupby(sorted(rank // gpus_per_node for rank in ranks))]
    rate = gpu.link_rate if len(together) == 1 else min(gpu.link_rate, gpu.network_rate * min(together))
    return moved / (rate * LINK_EFFICIENCY)
