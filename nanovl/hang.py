"""What a hang leaves in `traces/` of the run folder, from every rank, so that it can be explained afterwards.

hang_rank_N.txt    the last step, and the stack of every Python thread
comm_rank_N        torch's flight recorder: the rank's latest collectives, as `torchfrtrace` reads them

The rank whose collective times out writes both and tells the others through the group's store; a thread in each of
them listens. nccl does the same for the flight recorder in its own threads and then aborts the process, at which
faulthandler writes the stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import socket
import threading
import time
import traceback
from pathlib import Path

from torch._C import _distributed_c10d as c10d
from torch.distributed import DistError, distributed_c10d, get_process_group_ranks

from nanovl.errors import NanovlError

COLLECTIVES = "comm_rank_"
NEWS_SECONDS = 1.0
"""Seconds between two looks at whether another rank has timed out."""


def record_collectives(folder: Path, entries: int) -> None:
    """Let torch keep the latest `entries` collectives and write them into `folder` on a timeout.

    torch 2.11 to 2.13 read these names when the first process group starts.
    """
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(entries)
    os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / COLLECTIVES)  # torch appends the rank
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1" if entries else "0"


class HangWatch:
    """Writes this rank's files when it, or another rank, waits in vain; idle in a job of one rank.

    Set `step` after every step.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.step = 0
        self.folder, self.rank = folder, rank
        self.stacks = folder / f"hang_rank_{rank}.txt"
        self.thread: threading.Thread | None = None
        if world_size == 1:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.file = self.stacks.open("a", encoding="utf-8")
        faulthandler.enable(self.file)  # for deaths in C++, such as nccl's abort
        # a name of its own for each start of the group, since ranks that were restarted may meet the same store
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = c10d.PrefixStore(f"hang_{attempt}", distributed_c10d._get_default_store())
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.collectives_kept = os.environ.get("TORCH_FR_BUFFER_SIZE") == "0"
        self.thread = threading.Thread(target=self._listen, name="hang watch", daemon=True)
        self.thread.start()

    def explain(self, error: RuntimeError) -> NanovlError | None:
        """What happened and where to look, if `error` comes from waiting for other ranks; else None."""
        text = str(error).lower()
        if self.thread is None or not (isinstance(error, DistError) or "gloo" in text):
            return None
        me = f"rank {self.rank} ({socket.gethostname()})"
        timed_out = "timed out" in text or "timeout" in text
        if timed_out:
            self._tell(me)
        teller = me if timed_out else self._told()
        if not teller:
            return NanovlError(
                f"{me} lost the connection to another rank after step {self.step}: {error}\n"
                f"  the rank that died first says why, in {self.folder.parent / 'logs'} or on its terminal"
            )
        self._write(teller, error)
        # the others may have their news from this process, which is about to end
        time.sleep(2 * NEWS_SECONDS)
        return NanovlError(
            f"{me} waited in vain for another rank after step {self.step}: {error}\n"
            f"  {self.stacks} shows where it waits, hang_rank_*.txt beside it where the others are, and\n"
            f"  torchfrtrace --prefix {COLLECTIVES} {self.folder} compares their collectives. A rank that was only "
            "slow needs a longer comm.train_timeout_seconds; comm.init_timeout_seconds before the first step, and "
            "comm.outside_timeout_seconds where it saved, evaluated or sampled"
        )

    def close(self) -> None:
        """Stop listening; a file with nothing in it is removed."""
        if self.thread is None:
            return
        self.ended.set()
        self.thread.join()
        faulthandler.disable()
        self.file.close()
        if self.stacks.stat().st_size == 0:
            self.stacks.unlink()

    def _listen(self) -> None:
        while not self.ended.wait(NEWS_SECONDS):
            teller = self._told()
            if teller:
                self._write(teller)
                return

    def _tell(self, me: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that held it
            self.store.set("timed_out", me)

    def _told(self) -> str:
        """The rank that timed out, if one has."""
        with contextlib.suppress(RuntimeError):
            if self.store.check(["timed_out"]):
                return self.store.get("timed_out").decode()
        return ""

    def _write(self, teller: str, error: RuntimeError | None = None) -> None:
        """Add this rank's stacks to its file, and write its collectives."""
        with self.lock:
            self.file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')} {teller} timed out; "
                f"this is rank {self.rank} ({socket.gethostname()}), {self.step} steps done\n\n"
            )
            if error is not None:
                self.file.writelines([*traceback.format_exception(error), "\n"])
            self.file.flush()
            faulthandler.dump_traceback(self.file, all_threads=True)
            if not self.collectives_kept:  # those a slow rank starts later would hide which it missed
                self.collectives_kept = True
                (self.folder / f"{COLLECTIVES}{self.rank}").write_bytes(_collectives())


def _collectives() -> bytes:
    """torch's flight recorder, with the groups' names and ranks, which gloo leaves out."""
    recorded = pickle.loads(c10d._dump_fr_trace())  # type: ignore[attr-defined]  # torch's stub lacks it
    recorded["pg_config"] = {
        group.group_name: {
            "name": group.group_name,
            "desc": group.group_desc,
            "ranks": str(get_process_group_ranks(group)),
        }
        for group in distributed_c10d._pg_map
    }
    return pickle.dumps(recorded)
