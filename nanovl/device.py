"""The machine: device, what it can do at most, and the modes that are fastest on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from typing import Literal

import torch

# dense bfloat16 FLOP/s of one device, from the vendors' data sheets; matched by the whole name torch reports
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


def pick_device(local_rank: int = 0, name: str = "") -> torch.device:
    """This rank's device: `name` if given, else its GPU, else the CPU."""
    if name:
        return torch.device(name)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def hardware(device: torch.device) -> str:
    """One line for reports: the GPU's name, or the CPU's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 peak of the device; None where it is not known, so that no utilisation is made up."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process held so far: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB


@dataclass(frozen=True)
class Modes:
    """How a job computes, after every "auto" is decided."""

    param_dtype: torch.dtype
    compile: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


# measured by benchmarks/train_cpu.py: below these widths casts cost more than they save
CPU_BF16_MIN_WIDTH = 256
COMPILE_SECONDS_WORTH_STEPS = 300
CPU_LOGITS_BYTES = 8 * 2**20


def decide_modes(
    device: torch.device,
    hidden_size: int,
    steps: int,
    dtype: Literal["auto", "bfloat16", "float32"],
    compile_mode: Literal["auto", "on", "off"],
) -> Modes:
    """The fastest known mode where the job says "auto".

    A GPU computes in bfloat16, compiled. A CPU computes in bfloat16 where it multiplies bfloat16 in hardware and the
    model is wide enough, and compiles where the run is long enough to earn the compilation back.
    """
    gpu = device.type == "cuda"
    wide = hidden_size >= CPU_BF16_MIN_WIDTH and cpu_multiplies_bf16()
    param_dtype = (
        (torch.bfloat16 if gpu or wide else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    )
    compiled = (
        (gpu or steps >= COMPILE_SECONDS_WORTH_STEPS) if compile_mode == "auto" else compile_mode == "on"
    )
    return Modes(param_dtype, compiled, device)


def loss_chunk_tokens(device: torch.device, vocab_size: int) -> int:
    """Tokens whose logits the loss holds at once: on a CPU as many as stay in cache, on a GPU enough to fill it."""
    return 4096 if device.type == "cuda" else max(64, CPU_LOGITS_BYTES // (4 * vocab_size))


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (AMX or AVX512_BF16)."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def set_determinism(deterministic: bool) -> None:
    """Only deterministic kernels from here on, in this process."""
    if deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS reads it when its first handle is made
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.machine(),
            )
    except OSError:
        return platform.processor() or platform.machine()
