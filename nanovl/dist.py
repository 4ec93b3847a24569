"""Process groups: start and stop, small reductions, and gloo ranks forked on this machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore
from torch.distributed import distributed_c10d

from nanovl.errors import NanovlError


@dataclass(frozen=True)
class World:
    """Who this process is among all of the job's."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


def world_from_env() -> World:
    """RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them; one process without."""
    return World(
        *(int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    )


def start(device: torch.device, timeout_seconds: float = 600.0) -> World:
    """Join the job's process group (nccl on CUDA, gloo on CPU); a lone process makes a group of one."""
    world = world_from_env()
    if dist.is_initialized():
        return World(dist.get_rank(), world.local_rank, dist.get_world_size())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if world.size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return world


def set_timeout(seconds: float, keep: Collection[dist.ProcessGroup | None] = ()) -> None:
    """Let a collective of any group this rank is in wait `seconds` from here on; groups in `keep` stay as they are.

    All ranks call it. It begins with a barrier, or a fast rank would lose patience with one that is still slow by the
    old limit.
    """
    barrier()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    for group in distributed_c10d._pg_map:
        # torchtitan's mesh gives axes of degree 1 a fake group, which has nothing to wait for
        if group not in keep and dist.get_backend(group) != "fake":
            # torch has no public name for it: torch.distributed.set_timeout is in no release up to 2.13
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def patience(
    seconds: float, back_to: float, keep: Collection[dist.ProcessGroup | None] = ()
) -> Iterator[None]:
    """`set_timeout(seconds)` for what runs inside, whose length says nothing of a hang, and `back_to` behind it."""
    set_timeout(seconds, keep)
    yield  # an error goes past the rest: other ranks would not come to its barrier
    set_timeout(back_to, keep)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(values: torch.Tensor, op: str = "sum", group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """`values` reduced over the ranks by `sum`, `max` or `min`, in place; unchanged in a group of one."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(
            values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op], group
        )
    return values


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's `value`, on every rank."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


class RankFailed(NanovlError):
    """A forked rank raised; the message is its traceback."""


def fork_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """`fn(rank, *args)` on `world` forked gloo ranks; their results in order.

    Forking after torch is imported costs 0.1 s where spawning costs seconds. Rendezvous is a file, so no port can
    clash. Raises RankFailed with the traceback of the rank that failed first, not of those it left waiting.
    """
    import torch._dynamo  # noqa: F401  (each child would import it in its first FSDP step)

    from nanovl.mesh import import_torchtitan

    import_torchtitan()  # seconds, which each child would take

    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory(prefix="nanovl_ranks_") as folder:
        store = str(Path(folder) / "store")
        children = [
            context.Process(target=_rank_main, args=(fn, rank, world, args, store, results, timeout_seconds))
            for rank in range(world)
        ]
        for child in children:
            child.start()
        try:
            return _collect(results, children, world, time.monotonic() + timeout_seconds)
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    store: str,
    results: Any,
    timeout_seconds: float,
) -> None:
    # a group of the process this one was forked from has no threads here: if collected, it would wait for them forever
    gc.freeze()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_seconds),
        )
        # bytes, because tensors on a queue travel by a file descriptor that dies with this process
        results.put((rank, True, pickle.dumps(fn(rank, *args))))
        barrier()  # nobody leaves while a peer still talks to it
        stop()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)


def _collect(results: Any, children: list[Any], world: int, deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    failures: list[str] = []
    while len(values) + len(failures) < world:
        try:
            rank, ok, value = results.get(timeout=0.5)
        except queue.Empty:
            dead = [rank for rank, child in enumerate(children) if child.exitcode not in (None, 0)]
            if failures and time.monotonic() > deadline:
                break
            if time.monotonic() > deadline:
                failures.append(f"timed out; no answer from ranks {sorted(set(range(world)) - set(values))}")
                break
            if dead and not failures and results.empty():
                failures.append(f"ranks {dead} died with exit codes {[children[r].exitcode for r in dead]}")
                break
            continue
        if ok:
            values[rank] = pickle.loads(value)
        else:
            failures.append(f"rank {rank}:\n{value}")
            deadline = min(
                deadline, time.monotonic() + 5
            )  # its peers fail soon after, by the lost connection
    if failures:
        raise RankFailed(min(failures, key=lambda text: "by peer" in text or "timed out" in text))
    return [values[rank] for rank in range(world)]
