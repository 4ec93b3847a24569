"""Which parameter belongs to which optimizer group: regular expressions over names, nothing left over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from nanovl.config.schema import OptimizerGroup
from nanovl.errors import ConfigError


@dataclass(frozen=True)
class Assigned:
    """A group and the parameters it got, in the model's order."""

    config: OptimizerGroup
    parameters: list[tuple[str, nn.Parameter]]

    @property
    def elements(self) -> int:
        """Numbers in all of them, counted over all ranks."""
        return sum(parameter.numel() for _, parameter in self.parameters)


def assign(
    named_parameters: Iterable[tuple[str, nn.Parameter]], groups: Sequence[OptimizerGroup]
) -> list[Assigned]:
    """Give every parameter to the first group whose `match` fits its whole name.

    Frozen parameters count as matched but are given to nobody, and need no group. Raises ConfigError, with
    every mistake: parameters no group matches, groups left without any, Muon groups with vectors or with a
    `beta1`.
    """
    parameters = list(named_parameters)
    takers: list[list[tuple[str, nn.Parameter]]] = [[] for _ in groups]
    unmatched = []
    for name, parameter in parameters:
        first = next((i for i, group in enumerate(groups) if re.fullmatch(group.match, name)), None)
        if first is not None:
            takers[first].append((name, parameter))
        elif parameter.requires_grad:
            unmatched.append(name)
    mistakes = []
    if unmatched:
        mistakes.append(
            f"optimizer.groups: no pattern matches {len(unmatched)} of {len(parameters)} parameters: "
            f'{shorten(unmatched)}; name them in a group, or end with one of match = ".*"'
        )
    if not any(parameter.requires_grad for _, parameter in parameters):
        mistakes.append(
            f"optimizer: all {len(parameters)} parameters of the model are frozen; leave some to be trained"
        )
    names = [name for name, _ in parameters]
    for i, (group, taken) in enumerate(zip(groups, takers, strict=True)):
        mistakes += _group_mistakes(f"optimizer.groups.{i}", group, taken, names)
    if mistakes:
        raise ConfigError(mistakes, "optimizer")
    return [
        Assigned(group, [(name, p) for name, p in taken if p.requires_grad])
        for group, taken in zip(groups, takers, strict=True)
    ]


def _group_mistakes(
    where: str, group: OptimizerGroup, taken: list[tuple[str, nn.Parameter]], names: list[str]
) -> list[str]:
    if not taken:
        shadowed = [name for name in names if re.fullmatch(group.match, name)]
        why = (
            f"the {len(shadowed)} parameters it matches are taken by groups before it; move it up"
            if shadowed
            else f"matches none of the {len(names)} parameters ({shorten(names)}); correct or remove it"
        )
        return [f"{where}.match = {group.match!r}: {why}"]
    if group.kind != "muon":
        return []
    mistakes = []
    vectors = [name for name, parameter in taken if parameter.ndim < 2]
    if vectors:
        mistakes.append(
            f"{where}.kind = 'muon': takes matrices only, but {group.match!r} matches {shorten(vectors)} "
            'with fewer than 2 dimensions; put a group of kind = "adamw" for them before it'
        )
    if group.beta1 is not None:
        mistakes.append(
            f"{where}.beta1 = {group.beta1}: muon has no beta1; remove it, or set optimizer.muon.momentum "
            "for all muon groups"
        )
    return mistakes


def shorten(names: Sequence[str]) -> str:
    """All of `names`, the numbers of layers and experts folded: `layers.*.mlp.weight (x12), norm.weight`."""
    folded = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} (x{count})" for name, count in folded.items())
