"""Named tensors that are looked at without being read, and read one at a time: so no model has to fit into memory.

What lies on disk is one of these (safetensors, DCP, ...); so are the same tensors in another dtype, or under other
names. A chain of them from source to file is a conversion, and holds about two groups of a key map at once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nanovl.checkpoint.key_map import Group, KeyMap
from nanovl.errors import CheckpointError
from nanovl.mesh import copy_full
from nanovl.spec import KeyGroup, KeyRule, ModelSpec


class Tensors(ABC):
    """Tensors by name."""

    described: Mapping[str, Tensor]
    """All of them on the meta device: shape and dtype as `read` will give."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One of them. Cheapest in the order of `described`, each once."""

    def parts(self) -> Sequence[Tensors]:
        """What it reads from."""
        return ()


class Held(Tensors):
    """Tensors in memory."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.described = {name: value.detach().to("meta") for name, value in values.items()}

    def read(self, name: str) -> Tensor:
        return self.values[name].detach()


class Joined(Tensors):
    """The tensors of several."""

    def __init__(self, *parts: Tensors) -> None:
        self._parts = parts
        self.described = {name: value for part in parts for name, value in part.described.items()}
        self._part = {name: part for part in parts for name in part.described}

    def read(self, name: str) -> Tensor:
        return self._part[name].read(name)

    def parts(self) -> Sequence[Tensors]:
        return self._parts


class Without(Tensors):
    """Those of `source` but for `names`."""

    def __init__(self, source: Tensors, names: Collection[str]) -> None:
        self.source = source
        self.described = {name: value for name, value in source.described.items() if name not in names}

    def read(self, name: str) -> Tensor:
        return self.source.read(name)

    def parts(self) -> Sequence[Tensors]:
        return (self.source,)


class Called(Tensors):
    """Those of `source` that `names` has, under another name each: new -> old."""

    def __init__(self, source: Tensors, names: Mapping[str, str]) -> None:
        self.source, self.names = source, names
        self.described = {new: source.described[old] for new, old in names.items()}

    def read(self, name: str) -> Tensor:
        return self.source.read(self.names[name])

    def parts(self) -> Sequence[Tensors]:
        return (self.source,)


class Counted(Tensors):
    """Those of `source`; `count` is told the bytes of each that is read."""

    def __init__(self, source: Tensors, count: Callable[[int], None]) -> None:
        self.source, self.count, self.described = source, count, source.described

    def read(self, name: str) -> Tensor:
        value = self.source.read(name)
        self.count(value.nbytes)
        return value

    def parts(self) -> Sequence[Tensors]:
        return (self.source,)


class InDtype(Tensors):
    """Those of `source` that `dtypes` names in another dtype, the others as they are."""

    def __init__(self, source: Tensors, dtypes: Mapping[str, torch.dtype]) -> None:
        self.source = source
        self.described = {n: v.to(dtypes.get(n, v.dtype)) for n, v in source.described.items()}

    def read(self, name: str) -> Tensor:
        value = self.source.read(name)
        cast = value.to(self.described[name].dtype)
        if cast.dtype == torch.float16 and cast.isinf().sum() > value.isinf().sum():
            largest = value[value.isfinite()].abs().max().item()
            raise CheckpointError(
                f"{name} holds numbers up to {largest:.3g}, float16 none above 65504; choose bfloat16 or float32"
            )
        return cast

    def parts(self) -> Sequence[Tensors]:
        return (self.source,)


class Renamed(Tensors):
    """Those of `source` through the groups of a key map, one way or the other; a group is read once."""

    def __init__(self, source: Tensors, groups: Iterable[Group], *, to_ours: bool) -> None:
        self.source, self.to_ours, self.groups = source, to_ours, list(groups)
        self.described = {n: v for g in self.groups for n, v in self._converted(g, source.described).items()}
        self._group = {name: group for group in self.groups for name in self._after(group)}
        self._values: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        if name not in self._values:
            self._values.clear()
            group = self._group[name]
            before = group.theirs if self.to_ours else group.ours
            self._values |= self._converted(group, {n: self.source.read(n) for n in before})
        return self._values.pop(name)

    def parts(self) -> Sequence[Tensors]:
        return (self.source,)

    def mapping(self, written: Mapping[str, Tensor]) -> list[str]:
        """A line for each group: names before and after, shapes and dtypes, those of `written` where it has them."""
        lines, values = [], {**self.described, **written}
        for group in self.groups:
            before, after = (group.theirs, group.ours) if self.to_ours else (group.ours, group.theirs)
            kinds = dict.fromkeys((tuple(v.shape), v.dtype) for v in (values[n] for n in after))
            said = ", ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in kinds)
            lines.append(f"{_listed(before)} -> {_listed(after)}  {said}")
        return lines

    def _converted(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before, convert = (group.theirs, group.to_ours) if self.to_ours else (group.ours, group.to_theirs)
        return dict(zip(self._after(group), convert([values[n] for n in before]), strict=True))

    def _after(self, group: Group) -> tuple[str, ...]:
        return group.ours if self.to_ours else group.theirs


def _listed(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return " + ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)})"


def under_our_names(
    source: Tensors,
    rules: Sequence[KeyRule | KeyGroup],
    wanted: Mapping[str, Tensor],
    what: str,
) -> Renamed:
    """`source` through a key map: exactly the names and shapes of `wanted`. `what` lies where, for errors.

    Raises CheckpointError listing every tensor that is unknown, missing, of another shape or there in two layouts.
    """
    names, there = KeyMap(rules), source.described
    found = {theirs: names.group(theirs=theirs) for theirs in there}
    # in one order on every rank: filling sharded parameters may ask the others
    groups = dict.fromkeys(g for g in found.values() if g is not None and wanted.keys() >= set(g.ours))
    wrong = [f"unknown {theirs}" for theirs, group in found.items() if group not in groups]
    wrong += [f"missing {theirs}" for group in groups for theirs in group.theirs if theirs not in there]
    filled = Counter(ours for group in groups for ours in group.ours)
    wrong += [
        f"missing {theirs}"
        for ours in wanted.keys() - filled.keys()
        for theirs in names.group_of(ours).theirs
    ]
    wrong += [f"twice, in two layouts, {ours}" for ours, count in filled.items() if count > 1]
    for group in groups:
        if there.keys() >= set(group.theirs):
            shapes = _shape_mistakes(group, there, wanted)
            wrong += shapes
            if group.mistakes is not None and not shapes:
                wrong += group.mistakes([source.read(name) for name in group.theirs])
    if wrong:
        raise CheckpointError(
            f"{what}:" + "".join(f"\n  {line}" for line in sorted(set(wrong), key=_by_number))
        )
    return Renamed(source, groups, to_ours=True)


def _by_number(line: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", line)]


def _shape_mistakes(group: Group, there: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    listed = " + ".join(group.theirs[:2])
    try:
        values = group.to_ours([there[name] for name in group.theirs])
    except (RuntimeError, ValueError, IndexError):  # torch's, of shapes that cannot be rearranged so
        shapes = ", ".join(dict.fromkeys(str(tuple(there[name].shape)) for name in group.theirs))
        into = ", ".join(f"{ours} {tuple(wanted[ours].shape)}" for ours in group.ours)
        return [f"{listed} is {shapes}, which cannot be rearranged into {into}"]
    return [
        f"{listed} is {tuple(value.shape)}, the model wants {tuple(wanted[ours].shape)}"
        for ours, value in zip(group.ours, values, strict=True)
        if value.shape != wanted[ours].shape
    ]


def same_names(names: Iterable[str]) -> list[KeyRule]:
    """The key map of files that have our own names."""
    return [KeyRule(name, name) for name in names]


@torch.no_grad()
def fill(model: nn.Module, tensors: Tensors) -> None:
    """Copy `tensors` into `model`, plain, sharded, or a pipeline's part: other stages have the rest."""
    here = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in tensors.described:
        if name in here:
            copy_full(here[name], tensors.read(name))


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """What checkpoints hold of `model`: parameters, a tied one under its first name, and persistent buffers."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def weights_of(spec: ModelSpec) -> dict[str, Tensor]:
    """The same of a model of `spec`, on the meta device."""
    with torch.device("meta"):
        return named_weights(spec.family.model(spec.config))


def tied_names(spec: ModelSpec) -> dict[str, str]:
    """Every further name of a parameter of `spec` -> the first, under which checkpoints hold it."""
    with torch.device("meta"):
        parameters = [*spec.family.model(spec.config).named_parameters(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name: known for name, p in parameters if (known := first.setdefault(id(p), name)) != name}


def fresh_buffers(spec: ModelSpec) -> dict[str, Tensor]:
    """Persistent buffers as a new model has them, made without its parameters."""
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    for module in model.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            delattr(module, name)
    model.to_empty(device="cpu")
    model.init_buffers(torch.device("cpu"))
    return named_weights(model)
