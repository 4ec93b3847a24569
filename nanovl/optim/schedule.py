"""How learning rate, Muon's momentum and weight decay move over a run: pure functions of the step.

`step` is the one about to be taken, counted from 0. Progress is clamped, so a run that is continued past its
end stays at the final values instead of leaving the curve (a straight line would go negative, a cosine rise
again).
"""

from __future__ import annotations

from math import cos, pi
from typing import Literal

from nanovl.config.schema import LrSchedule, Muon


def lr_factor(step: int, steps: int, schedule: LrSchedule) -> float:
    """Learning rate of `step` in a run of `steps`, as a fraction of the peak.

    Warm-up is (step + 1) / warmup_steps. `linear` and `cosine` fall from the end of warm-up, `wsd` over its
    last `decay_ratio`; all but `constant` reach min_lr_factor at step == steps, however long the warm-up.
    Where warm-up and fall overlap the smaller of the two counts.
    """
    warm = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps > 0 else 1.0
    if schedule.kind == "constant":
        return warm
    if step >= steps:
        return schedule.min_lr_factor
    if schedule.kind == "wsd":
        done = warmdown_progress(step, steps, schedule)
    else:
        done = _clamp((step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    height = 0.5 * (1 + cos(pi * done)) if schedule.kind == "cosine" else 1 - done
    return min(warm, schedule.min_lr_factor + (1 - schedule.min_lr_factor) * height)


def warmdown_progress(step: int, steps: int, schedule: LrSchedule) -> float:
    """Fraction of `wsd`'s final fall that lies behind `step`: 0 before it begins, 1 at the end of the run."""
    length = round(schedule.decay_ratio * steps)
    return _clamp((step - (steps - length)) / length) if length > 0 else float(step >= steps)


def muon_momentum(step: int, steps: int, muon: Muon, schedule: LrSchedule) -> float:
    """Muon's momentum at `step`: up from momentum_start, in `wsd`'s fall towards momentum_end, both linear.

    The other schedules have no fall apart from the whole run, so with them momentum stays at its peak. In a
    run shorter than its warm-up the fall starts from wherever the warm-up has got to, so nothing jumps.
    """
    warm = _clamp(step / muon.momentum_warmup_steps) if muon.momentum_warmup_steps > 0 else 1.0
    momentum = muon.momentum_start + (muon.momentum - muon.momentum_start) * warm
    if schedule.kind != "wsd":
        return momentum
    return momentum + (muon.momentum_end - momentum) * warmdown_progress(step, steps, schedule)


def weight_decay_factor(kind: Literal["constant", "linear", "cosine"], step: int, steps: int) -> float:
    """Weight decay of `step` as a fraction of the group's: 1 throughout, or falling to 0 at step == steps."""
    done = _clamp(step / steps) if steps > 0 else 1.0
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1 + cos(pi * done))


def _clamp(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))
