"""A family's key rules, applied to whole names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nanovl.errors import CheckpointError
from nanovl.spec import KeyGroup, KeyRule


@dataclass(frozen=True, eq=False)
class Group:
    """A key rule at one layer: whole names."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_theirs: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    mistakes: Callable[[Sequence[Tensor]], list[str]] | None = None


class KeyMap:
    """A family's key rules, applied to whole names."""

    def __init__(self, rules: Sequence[KeyRule | KeyGroup]) -> None:
        self._by_theirs: dict[str, KeyRule | KeyGroup] = {}
        self._by_ours: dict[str, KeyRule | KeyGroup] = {}
        self._groups: dict[tuple[int, str], Group] = {}
        for rule in rules:
            for theirs in _names(rule.theirs):
                self._by_theirs.setdefault(theirs, rule)
            for ours in _names(rule.ours):
                self._by_ours.setdefault(ours, rule)

    def group(self, *, theirs: str = "", ours: str = "") -> Group | None:
        """What either name is read or written with; None where no rule matches. Equal groups are the same object."""
        return self._find(self._by_theirs, theirs) if theirs else self._find(self._by_ours, ours)

    def group_of(self, ours: str) -> Group:
        """What `ours` is written with. Raises CheckpointError where there is no rule."""
        group = self.group(ours=ours)
        if group is None:
            raise CheckpointError(f"{ours}: the family's key map has no rule for it")
        return group

    def _find(self, rules: Mapping[str, KeyRule | KeyGroup], name: str) -> Group | None:
        for pattern, layer in _patterns(name):
            if (rule := rules.get(pattern)) is not None:
                if (id(rule), layer) not in self._groups:
                    self._groups[id(rule), layer] = _at(rule, layer)
                return self._groups[id(rule), layer]
        return None


def _names(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def _patterns(name: str) -> Iterator[tuple[str, str]]:
    """`name` as it is, which says most; then with each of its numbers as {i}, and that number."""
    yield name, ""
    for match in re.finditer(r"(?<=\.)\d+(?=\.)", name):
        yield f"{name[: match.start()]}{{i}}{name[match.end() :]}", match[0]


def _at(rule: KeyRule | KeyGroup, layer: str) -> Group:
    theirs, ours = (tuple(n.replace("{i}", layer) for n in _names(name)) for name in (rule.theirs, rule.ours))
    if isinstance(rule, KeyGroup):
        return Group(theirs, ours, rule.to_ours, rule.to_theirs, rule.mistakes)
    return Group(theirs, ours, _each(rule.to_ours), _each(rule.to_theirs))


def _each(convert: Callable[[Tensor], Tensor] | None) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    return lambda values: values if convert is None else [convert(value) for value in values]
