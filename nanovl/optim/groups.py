"""Which parameter belongs to which optimizer group: regular expressions over names, nothing left over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from nanovl.config.schema import OptimizerGroup
from nanovl.errors import ConfigError


@dataclass(frozen=True)
class Assigned:
    """A group and the parameters it got, in the model's order."""

    config: OptimizerGroup
    parameters: list[tuple[str, nn.Parameter]]
    """Those that are here: all of them, or a pipeline stage's."""
    count: int
    """Parameters of the group in the whole model."""
    elements: int
    """Numbers in these."""


def assign(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    groups: Sequence[OptimizerGroup],
    all_sizes: Mapping[str, int] | None = None,
) -> list[Assigned]:
    """Give every parameter to the first group whose `match` fits its whole name.

    `all_sizes` = numbers in every parameter of the whole model, where these are only a pipeline stage's: then a group,
    or all, may be empty here. Frozen parameters count as matched but are given to nobody, and need no group. Raises
    ConfigError, with every mistake: parameters no group matches, groups left without any, Muon groups with vectors
    or with a `beta1`.
    """
    parameters = list(named_parameters)
    takers: list[list[tuple[str, nn.Parameter]]] = [[] for _ in groups]
    unmatched = []
    for name, parameter in parameters:
        first = _taker(name, groups)
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
    sizes = all_sizes or {name: parameter.numel() for name, parameter in parameters}
    names = list(sizes)
    trained = any(parameter.requires_grad for _, parameter in parameters)
    if not trained and len(names) <= len(parameters):
        mistakes.append(
            f"optimizer: all {len(parameters)} parameters of the model are frozen; leave some to be trained"
        )
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    taken_by = [(name, _taker(name, groups)) for name in names]
    taking = {group for _, group in taken_by}
    for i, (group, taken) in enumerate(zip(groups, takers, strict=True)):
        mistakes += _group_mistakes(f"optimizer.groups.{i}", group, taken, names, i in taking)
    if mistakes:
        raise ConfigError(mistakes, "optimizer")
    found = []
    for i, (group, taken) in enumerate(zip(groups, takers, strict=True)):
        everywhere = [sizes[name] for name, taker in taken_by if taker == i and name not in frozen]
        here = [(name, p) for name, p in taken if p.requires_grad]
        found.append(Assigned(group, here, len(everywhere), sum(everywhere)))
    return found


def _taker(name: str, groups: Sequence[OptimizerGroup]) -> int | None:
    return next((i for i, group in enumerate(groups) if re.fullmatch(group.match, name)), None)


def _group_mistakes(
    where: str, group: OptimizerGroup, taken: list[tuple[str, nn.Parameter]], names: list[str], taking: bool
) -> list[str]:
    if not taking:
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
