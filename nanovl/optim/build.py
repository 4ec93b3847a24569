"""The optimizers of a job: one AdamW and one Muon over the model's groups, driven by one schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovl.config import schema
from nanovl.optim.groups import Assigned, assign
from nanovl.optim.muon import Muon
from nanovl.optim.schedule import lr_factor, muon_momentum, weight_decay_factor

MUON_BETA2 = 0.9
"""NorMuon's, where a group names none."""


@dataclass(frozen=True)
class GroupPeak:
    """What one param group runs at when every schedule is at its height; no state dict can overwrite it."""

    assigned: Assigned
    lr: float
    weight_decay: float
    fixed: dict[str, Any]
    """The group's other options, rewritten every step: a checkpoint brings the ones it was saved with."""


class Optimizers:
    """Everything that moves weights. Call `set_schedule(step)`, then `step()`, for each step in turn.

    `optimizers` are plain torch ones, for torch.distributed.checkpoint.state_dict; their state exists from
    the start. The factors are those of optim/scaling.py, 1 where the job asks for no scaling.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        groups: Sequence[schema.OptimizerGroup],
        optimizer: schema.Optimizer,
        lr_schedule: schema.LrSchedule,
        *,
        steps: int,
        width_factor: float = 1.0,
        batch_factor: float = 1.0,
        decay_factor: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
        all_sizes: Mapping[str, int] | None = None,
    ) -> None:
        """`width_factor` and `batch_factor` scale lr of groups that ask, `decay_factor` Muon's weight decay.

        Raises ConfigError, with every mistake, where parameters and groups do not fit.
        """
        self.config = optimizer
        self.lr_schedule = lr_schedule
        self.steps = steps
        self.groups = assign(named_parameters, groups, all_sizes)
        self.optimizers: list[torch.optim.Optimizer] = []
        self._written: list[list[GroupPeak]] = []  # one for each param group of each optimizer
        self.peaks = [
            self._peak(assigned, width_factor, batch_factor, decay_factor) for assigned in self.groups
        ]
        for kind in ("adamw", "muon"):
            self._add(kind, compute_dtype)
        self.set_schedule(0)

    def set_schedule(self, step: int) -> None:
        """Write all options of all groups for the step about to be taken, counted from 0."""
        factor = lr_factor(step, self.steps, self.lr_schedule)
        momentum = muon_momentum(step, self.steps, self.config.muon, self.lr_schedule)
        self._lr_factor = factor
        for optimizer, peaks in zip(self.optimizers, self._written, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                decay = weight_decay_factor(peak.assigned.config.weight_decay_schedule, step, self.steps)
                group.update(peak.fixed, lr=peak.lr * factor, weight_decay=peak.weight_decay * decay)
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @property
    def lr(self) -> float:
        """Learning rate now of the group with the most elements: one number to log."""
        return max(self.peaks, key=lambda peak: peak.assigned.elements).lr * self._lr_factor

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Header and rows, one a group, at peak values, for log.table."""
        header = ["group", "rule", "parameters", "elements", "peak lr", "weight decay"]
        rows: list[list[object]] = []
        for peak in self.peaks:
            config, count, elements = peak.assigned.config, peak.assigned.count, peak.assigned.elements
            rows.append([config.match, config.kind, count, elements, peak.lr, peak.weight_decay])
        return header, rows

    def _peak(self, assigned: Assigned, width: float, batch: float, decay: float) -> GroupPeak:
        group, base = assigned.config, self.config
        lr = base.lr if group.lr is None else group.lr
        weight_decay = base.weight_decay if group.weight_decay is None else group.weight_decay
        if group.scale_with_width:
            lr *= width
        if group.scale_with_batch:
            lr *= batch
        if group.kind == "muon":
            fixed: dict[str, Any] = {"beta2": MUON_BETA2 if group.beta2 is None else group.beta2}
            return GroupPeak(assigned, lr, weight_decay * decay, fixed)
        betas = (
            base.beta1 if group.beta1 is None else group.beta1,
            base.beta2 if group.beta2 is None else group.beta2,
        )
        fixed = {"betas": betas, "eps": base.eps, **_kernel(base.implementation)}
        return GroupPeak(assigned, lr, weight_decay, fixed)

    def _add(self, kind: str, compute_dtype: torch.dtype) -> None:
        """One optimizer for all groups of `kind` that have something to train, its state made."""
        peaks = [
            peak for peak in self.peaks if peak.assigned.config.kind == kind and peak.assigned.parameters
        ]
        if not peaks:
            return
        groups = [{"params": [p for _, p in peak.assigned.parameters], **peak.fixed} for peak in peaks]
        if kind == "muon":
            muon = Muon(groups, self.config.muon, lr=0.0, compute_dtype=compute_dtype)
            muon.init_state()
            self.optimizers.append(muon)
        else:
            adamw = torch.optim.AdamW(groups, lr=0.0, **_kernel(self.config.implementation))
            _init_adamw_state(adamw)
            self.optimizers.append(adamw)
        self._written.append(peaks)


def _kernel(implementation: str) -> dict[str, Any]:
    return {"fused": implementation == "fused", "foreach": implementation == "foreach"}


@torch.no_grad()
def _init_adamw_state(adamw: torch.optim.AdamW) -> None:
    """Make the state at step 0, as AdamW itself would in its first step.

    torch.distributed.checkpoint makes missing state by taking a step on zero gradients, which leaves the
    count at 1.
    """
    for group in adamw.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else torch.device("cpu")
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
