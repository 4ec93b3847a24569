"""A program that test_memory.py runs: converts under a limit of memory, which the kernel enforces; prints the peaks."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

import nanovl
from nanovl.inference.load import load
from nanovl.log import out

ORDER = ("run", "safetensors", "dcp", "hf")
"""Each is converted from the one before: the first reads a Hugging Face directory, the last writes one."""


def kilobytes(key: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def main(src: str, folder: str, warm: str, limit_bytes: int) -> None:
    torch.set_num_threads(1)
    path = warm
    for to in ORDER:  # what is imported on the way is no part of the memory that is measured
        path = str(nanovl.convert(path, f"{folder}/warm_{to}", to=to))
    limit = kilobytes("VmData:") * 1024 + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    path, peaks = src, {}
    for to in ORDER:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        resident = kilobytes("VmRSS:")
        path = str(nanovl.convert(path, f"{folder}/{to}", to=to))
        peaks[to] = (kilobytes("VmHWM:") - resident) * 1024
    try:
        load(src, device="cpu")
    except (MemoryError, RuntimeError) as error:
        out(json.dumps({"peaks": peaks, "load": str(error)}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
