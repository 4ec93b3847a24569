"""What operations cost beside arithmetic: bytes between ranks, bytes alive, counted operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

Collective = Literal[
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send", "receive", "broadcast"
]
SPELLINGS: dict[str, Collective] = {
    "reduce_scatter": "reduce-scatter",
    "all_gather": "all-gather",
    "allgather": "all-gather",
    "all_reduce": "all-reduce",
    "allreduce": "all-reduce",
    "all_to_all": "all-to-all",
    "alltoall": "all-to-all",
    "send": "send",
    "recv": "receive",
    "broadcast": "broadcast",
}


@dataclass
class Traffic:
    """Bytes and calls by (process group or mesh axis, collective).

    A collective counts as its largest tensor: what is gathered, what is scattered, what is reduced, what is sent.
    """

    bytes: Counter[tuple[str, Collective]] = field(default_factory=Counter)
    calls: Counter[tuple[str, Collective]] = field(default_factory=Counter)

    def add(self, where: str, what: Collective, size: float, calls: float = 1) -> None:
        self.bytes[where, what] += size  # type: ignore[assignment]
        self.calls[where, what] += calls  # type: ignore[assignment]

    def add_all(self, other: Traffic, times: float = 1) -> None:
        for key, size in other.bytes.items():
            self.add(*key, size * times, other.calls[key] * times)

    def renamed(self, names: Mapping[str, str]) -> Traffic:
        """The same under other names."""
        renamed = Traffic()
        for (where, what), size in self.bytes.items():
            renamed.add(names[where], what, size, self.calls[where, what])
        return renamed


@dataclass
class Account:
    """What one stretch of a program did."""

    traffic: Traffic = field(default_factory=Traffic)
    flops: float = 0.0
    """Of matrix products with weights; attention is not counted."""
    batched_flops: float = 0.0
    """Of products of batches of matrices, such as Muon's."""
    before: int = 0
    """Bytes alive when it began."""
    peak: int = 0
    """Most bytes alive while it ran."""
    after: int = 0
    """Bytes alive when it ended."""


class Ledger(TorchDispatchMode):
    """While it is entered, books every operation on the account that is open.

    Works on real tensors and on fake ones. Only tensors made under it count as alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.account = Account()
        self.live = 0
        self.looks = True
        """Whether what is alive now counts towards the most."""
        self._storages: dict[int, weakref.ref[Any]] = {}

    def open(self, account: Account) -> Account:
        """Book on `account` from here on; the one before is closed."""
        self.account.after = self.live
        self.account = account
        account.before = account.peak = self.live
        return account

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # its own dispatch comes first: then what it does inside is seen
            return NotImplemented
        kwargs = kwargs or {}
        if (
            func.namespace == "nanovl"
        ):  # an operator of our own, such as ring attention: what it is made of counts
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        for tensor in _tensors((*args, *kwargs.values())):
            self._watch(tensor, made_here=False)
        out = _fake(func, args, kwargs) if _is_beyond_fake(func, args) else func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._book_collective(func, args, kwargs, out)
        self._book_products(func._overloadpacket, args)
        for tensor in _tensors(out):
            self._watch(tensor, made_here=True)
        if self.looks:
            self.account.peak = max(self.account.peak, self.live)
        return out

    def _book_products(self, packet: Any, args: Any) -> None:
        aten = torch.ops.aten
        if packet in (aten.mm, aten.addmm, aten._grouped_mm):  # a grouped one may have rows on both sides
            a, b = args[1:3] if packet is aten.addmm else args[:2]
            self.account.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[-1]
        elif packet in (aten.bmm, aten.baddbmm):
            a, b = args[1:3] if packet is aten.baddbmm else args[:2]
            self.account.batched_flops += 2.0 * a.numel() * b.shape[-1]

    def _book_collective(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._opname
        what = next((kind for spelling, kind in SPELLINGS.items() if spelling in name), None)
        if what is None:  # waits and barriers
            return
        sizes = [_size(value) for value in (*args, *kwargs.values(), out)]
        self.account.traffic.add(_group_name((*args, *kwargs.values())), what, max(sizes))

    def _watch(self, tensor: Tensor, *, made_here: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if made_here else 0
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size


def _is_beyond_fake(func: Any, args: Any) -> bool:
    """What fake tensors of torch 2.13 do not know: a grouped product of anything but bfloat16, whose shape they refuse
    to tell; the fused AdamW, which they take for one that makes new tensors; and how much is not zero."""
    if func is torch.ops.aten._grouped_mm.default:
        return isinstance(args[0], FakeTensor) and args[0].dtype != torch.bfloat16
    if func is torch.ops.aten.nonzero.default:
        return isinstance(args[0], FakeTensor)
    return func is torch.ops.aten._fused_adamw_.default and isinstance(args[0][0], FakeTensor)


def _fake(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Rows times matrices give rows; rows times rows give matrices, one for each group. AdamW works in place. One thing
    is not zero: asked for are the first tokens of documents, and a plan has one."""
    if func is torch.ops.aten._fused_adamw_.default:
        return None
    if func is torch.ops.aten.nonzero.default:
        return args[0].new_empty((1, args[0].ndim), dtype=torch.int64)
    a, b = args[:2]
    ends = args[2] if len(args) > 2 else kwargs["offs"]
    return a.new_empty((a.shape[0], b.shape[2]) if b.ndim == 3 else (len(ends), a.shape[0], b.shape[1]))


def _group_name(values: Any) -> str:
    """The process group among a collective's arguments: by name, or as the object."""
    for value in reversed(values):
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min", "product"):
            return value
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).group_name
    raise AssertionError(f"no process group among {values}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(value))
