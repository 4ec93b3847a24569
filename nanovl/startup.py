"""Do the ranks of a job belong together? Asked once, before anything else, because the answers come late otherwise.

A machine with other code, another TOML or a wrong clock trains along without a word; a bad link only shows as a loss
that differs. Each check names the ranks that are not like the rest.
"""

from __future__ import annotations

import hashlib
import json
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist

from nanovl import dist
from nanovl.config.load import job_to_dict
from nanovl.config.schema import Job
from nanovl.errors import NanovlError
from nanovl.run import git_state

PROBE_NUMBERS = 2**19
"""Float32 numbers in the trial all-reduce: 2 MiB."""
NAMED = 3
"""Settings and ranks a message names before it only counts."""


@dataclass(frozen=True)
class Facts:
    """What one rank says of itself; all but the host must be the same everywhere."""

    host: str
    commit: str | None
    """Commit, and a hash of what differs from it; None = not asked, another rank of the same machine answers."""
    nanovl: str
    torch: str
    settings: Mapping[str, str]
    """Every setting of the job but the run folder, which machines may mount at different places."""


def facts_of(job: Job, nanovl_version: str, local_rank: int) -> Facts:
    """This process's facts."""
    flat = _flatten(job_to_dict(job))
    del flat["job.run_dir"]
    commit = _commit() if local_rank == 0 else None
    return Facts(socket.gethostname(), commit, nanovl_version, torch.__version__, flat)


def check_ranks(
    facts: Facts,
    device: torch.device,
    *,
    max_clock_skew_seconds: float,
    clock: Callable[[], float] = time.time,
) -> str:
    """Compare all ranks and try an all-reduce; every rank calls it. Returns a line for the log.

    Raises NanovlError that names the odd ranks, on every rank.
    """
    rank, world = torch_dist.get_rank(), torch_dist.get_world_size()
    wrong_from, bytes_per_second = _try_all_reduce(rank, world, device)
    dist.barrier()
    answers: list[Any] = [None] * world
    torch_dist.gather_object((facts, clock(), wrong_from), answers if rank == 0 else None)
    mistakes, line = [], ""
    if rank == 0:
        everyone, clocks, wrong = zip(*answers, strict=True)
        hosts = [f.host for f in everyone]
        mistakes = [
            *_not_alike(everyone),
            *_wrong_clocks(clocks, hosts, max_clock_skew_seconds),
            *_wrong_sums(wrong, hosts),
        ]
        machines = len(set(hosts))
        line = (
            f"{world} ranks on {machines} machine{'s' if machines > 1 else ''} agree; all-reduce of "
            f"{PROBE_NUMBERS * 4 / 2**20:.0f} MiB at {bytes_per_second / 1e9:.2g} GB/s, "
            f"clocks within {max(clocks) - min(clocks):.2g} s"
        )
    mistakes, line = dist.broadcast_object((mistakes, line))
    if mistakes:
        raise NanovlError(
            "the ranks of this job do not belong together" + "".join(f"\n  {m}" for m in mistakes)
        )
    return line


def _try_all_reduce(rank: int, world: int, device: torch.device) -> tuple[list[int], float]:
    """Ranks whose share arrived wrong in a sum that is known, and the all-reduce's bus bandwidth in bytes a second.

    Number i is rank (i mod world)'s: it adds its rank + 1, all others 0. So a wrong number tells whose share it is.
    """
    owner_N = torch.arange(PROBE_NUMBERS, device=device) % world
    found: set[int] = set()
    seconds = 0.0
    for _ in range(2):  # the first opens the connections
        share_N = _share(owner_N, rank)
        began = time.perf_counter()
        wrong_N = dist.all_reduce(share_N) != owner_N + 1
        if wrong_N.any():  # waits for the device
            found.update(owner_N[wrong_N].tolist())
        seconds = time.perf_counter() - began
    return sorted(found), PROBE_NUMBERS * 4 * 2 * (world - 1) / world / seconds


def _share(owner_N: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.where(owner_N == rank, rank + 1.0, 0.0)


def _not_alike(everyone: Sequence[Facts]) -> list[str]:
    """A line for each fact that not all ranks share; the value that most have, or rank 0's, is the right one."""
    hosts = [f.host for f in everyone]
    lines = []
    for name, remedy in (
        ("commit", "check out the same commit on every machine"),
        ("nanovl", "install the same version on every machine"),
        ("torch", "install the same version on every machine"),
    ):
        lines += _odd(name, [getattr(f, name) for f in everyone], hosts, remedy)
    keys = sorted({key for f in everyone for key in f.settings})
    wrong = [
        line
        for key in keys
        for line in _odd(
            key,
            [f.settings.get(key, "not set") for f in everyone],
            hosts,
            "start every rank with the same --config files and flags",
        )
    ]
    more = [f"... and {len(wrong) - NAMED} more settings"] if len(wrong) > NAMED else []
    return [*lines, *wrong[:NAMED], *more]


def _odd(name: str, values: Sequence[str | None], hosts: Sequence[str], remedy: str) -> list[str]:
    counts = Counter(v for v in values if v is not None)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]  # of equally many, the one met first, which is rank 0's
    return [
        f"{name}: {_named([r for r, v in enumerate(values) if v == value], hosts)}: {value or 'none'}, "
        f"where the others have {usual or 'none'}; {remedy}"
        for value in counts
        if value != usual
    ]


def _wrong_clocks(clocks: Sequence[float], hosts: Sequence[str], limit: float) -> list[str]:
    usual = statistics.median_low(clocks)
    return [
        f"clock: {_named([rank], hosts)}: {abs(clock - usual):.1f} s {'ahead of' if clock > usual else 'behind'} "
        f"the others; synchronise it (NTP), or set comm.max_clock_skew_seconds above {limit:g}"
        for rank, clock in enumerate(clocks)
        if abs(clock - usual) > limit
    ]


def _wrong_sums(wrong: Sequence[Sequence[int]], hosts: Sequence[str]) -> list[str]:
    """Who is to blame: a rank that gets every share wrong, else the ranks whose share arrives wrong."""
    world = len(hosts)
    receivers = [rank for rank, senders in enumerate(wrong) if len(senders) == world]
    senders = {s for rank, found in enumerate(wrong) if rank not in receivers for s in found}
    odd = sorted({*receivers, *senders})
    if not odd:
        return []
    return [
        f"all-reduce: {_named(odd, hosts)}: a sum of known numbers came out wrong; "
        "test the memory, GPU and network of that machine and leave it out"
    ]


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """rank 3 (node7), rank 4 (node7) and 5 more."""
    shown = ", ".join(f"rank {r} ({hosts[r]})" for r in ranks[:NAMED])
    return shown + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")


def _commit() -> str:
    sha, _, diff = git_state()
    return f"{sha[:12]}+{hashlib.sha256(diff).hexdigest()[:8]}" if diff else sha[:12]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and JSON values; an empty table or list counts as a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    flat = {k: v for key, inner in items for k, v in _flatten(inner, f"{prefix}{key}.").items()}
    return flat or {prefix.removesuffix("."): json.dumps(value)}
