"""Any mesh against one rank: the same job on gloo ranks of this machine, its losses, gradients and weights compared.

Rows are made up, the same for every mesh, and unpleasant on purpose: documents of unequal lengths, targets without
loss, unequal loss weights. Initial weights are shaken, since families begin with zeros that would hide a gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanovl.build import build_model, build_optimizers
from nanovl.config.schema import Job, Parallelism
from nanovl.device import Modes
from nanovl.dist import fork_ranks
from nanovl.log import Log
from nanovl.mesh import build_mesh, copy_full
from nanovl.optim.expert_balance import ExpertBalance
from nanovl.optim.index_loss import IndexLosses
from nanovl.optim.scaling import SizeRules
from nanovl.parallelisms.init import named_generator
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.registry import resolve_model
from nanovl.spec import IGNORE_INDEX, Batch
from nanovl.step import train_step

CPU = torch.device("cpu")


@dataclass
class Outcome:
    """What k steps of a job came to, whole tensors under the names of one model."""

    losses: list[float]
    """Of each step, those of multi-token prediction behind it."""
    norms: list[float]
    """Gradient norms before clipping."""
    initial: dict[str, str] = field(default_factory=dict)
    """Digest of every initial weight's bytes."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, clipped."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    """Norm of what the steps changed in each weight."""


@dataclass(frozen=True)
class Difference:
    """How far one outcome is from another; gradients and weights relative to each tensor's norm, the worst one.

    A weight's norm, or the way it went if that is longer: some scalars happen to end near zero. The gradient of a
    single number, whose terms may cancel, counts as at least a thousandth of all gradients' norm.
    """

    loss: float
    """Largest relative difference over the steps."""
    norm: float
    gradient: float
    weight: float
    worst_gradient: str
    worst_weight: str


def outcome_on(job: Job, world: int, steps: int, *, timeout_seconds: float = 240.0) -> Outcome:
    """`steps` steps of `job`, all sizes in it set, on `world` forked ranks.

    Raises AssertionError where ranks disagree.
    """
    outcomes = fork_ranks(_steps_on_rank, world, job, world, steps, timeout_seconds=timeout_seconds)
    first: Outcome = outcomes[0]
    for other in outcomes[1:]:
        assert other.losses == first.losses, f"ranks log different losses: {other.losses} and {first.losses}"
        assert other.norms == first.norms, f"ranks log different norms: {other.norms} and {first.norms}"
        for mine, theirs in (
            (first.initial, other.initial),
            (first.gradients, other.gradients),
            (first.weights, other.weights),
        ):
            mine.update(theirs)  # stages of a pipeline complete each other
    return first


def on_one_rank(job: Job) -> Job:
    """The same job without any parallelism, all rows at once."""
    training = replace(job.training, local_batch_size=0)
    return replace(job, training=training, parallelism=Parallelism())


def compare(found: Outcome, expected: Outcome) -> Difference:
    """`found` against `expected`. Raises AssertionError where they do not hold the same parameters."""
    assert found.weights.keys() == expected.weights.keys(), found.weights.keys() ^ expected.weights.keys()
    total = sum(float(gradient.norm()) ** 2 for gradient in expected.gradients.values()) ** 0.5
    lone = {name: 1e-3 * total for name, gradient in expected.gradients.items() if gradient.numel() == 1}
    gradient, worst_gradient = _furthest(found.gradients, expected.gradients, lone)
    weight, worst_weight = _furthest(found.weights, expected.weights, expected.moved)
    return Difference(
        max(_relative(a, b) for a, b in zip(found.losses, expected.losses, strict=True)),
        max(_relative(a, b) for a, b in zip(found.norms, expected.norms, strict=True)),
        gradient,
        weight,
        worst_gradient,
        worst_weight,
    )


def made_up_rows(job: Job, vocab_size: int, step: int, rows: Sequence[int]) -> Batch:
    """Rows number `rows` of `step`: the same on every mesh."""
    length = job.training.seq_len
    made: dict[str, list[Tensor]] = {}
    for row in rows:
        generator = named_generator(step, f"row {row}")
        tokens = torch.randint(0, vocab_size, (length + 1,), generator=generator)
        starts = torch.rand(length, generator=generator) < 4 / length
        starts[0] = True
        doc_ids = starts.long().cumsum(0) - 1
        places = torch.arange(length)
        first = places[starts]
        targets = tokens[1:].clone()
        targets[torch.rand(length, generator=generator) < 0.1 * (1 + row % 3)] = IGNORE_INDEX
        weights = torch.rand(length, generator=generator) + 0.5
        for key, value in (
            ("tokens_BT", tokens[:-1]),
            ("targets_BT", targets),
            ("positions_BT", places - first[doc_ids]),
            ("doc_ids_BT", doc_ids),
            ("weights_BT", weights),
        ):
            made.setdefault(key, []).append(value)
    return {key: torch.stack(values) for key, values in made.items()}


@torch.no_grad()
def shake(model: ParallelModel, seed: int) -> None:
    """Add noise to every parameter, the same on every mesh."""
    for name, parameter in model.named_parameters():
        full = whole(parameter)
        noise = torch.randn(full.shape, generator=named_generator(seed, f"shake {name}"))
        copy_full(parameter, full + 0.1 * noise * (1 + full.std(correction=0)))


def whole(tensor: Tensor) -> Tensor:
    """The full value of a parameter or gradient; a collective where it is sharded."""
    tensor = tensor.detach()
    return (
        tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    ).clone()  # one rank's is its own memory


def _steps_on_rank(rank: int, job: Job, world: int, steps: int) -> Outcome:
    mesh = build_mesh(job.parallelism, world, CPU)
    spec = resolve_model(job.model, job.tokenizer.vocab_size)
    dtype = torch.bfloat16 if job.training.mixed_precision_param == "bfloat16" else torch.float32
    modes = Modes(dtype, job.compile.enable == "on")
    log = Log(1)  # says nothing
    job = replace(job, training=replace(job.training, steps=steps))
    model = build_model(job, spec, mesh, modes, CPU, log, fresh=True)
    groups = job.optimizer.groups or spec.family.optimizer_groups(spec.config)
    job = replace(job, optimizer=replace(job.optimizer, groups=groups))
    rules = SizeRules(0, 0, steps, 1.0, 1.0, 1.0)
    optimizers = build_optimizers(job, spec, model, rules, modes, log)
    balance, index_losses = ExpertBalance(model.whole, mesh), IndexLosses(model.whole, mesh)
    outcome = Outcome([], [])
    for name, parameter in model.named_parameters():
        outcome.initial[name] = hashlib.sha256(whole(parameter).numpy().tobytes()).hexdigest()
    shake(model, job.debug.seed)
    start = {name: whole(p) for name, p in model.named_parameters()}
    mine = range(mesh.data_rank, job.training.global_batch_size, mesh.data_degree)
    at_once = job.training.local_batch_size or len(mine)
    for step in range(steps):
        optimizers.set_schedule(step)
        parts = [mine[i : i + at_once] for i in range(0, len(mine), at_once)]
        batches = [made_up_rows(job, job.tokenizer.vocab_size, step, part) for part in parts]
        balance.begin_step(job.training.global_batch_size * job.training.seq_len)
        index_losses.begin_step(job.training.global_batch_size * job.training.seq_len)
        result = train_step(model, batches, max_norm=job.training.max_norm, chunk_tokens=16)
        balance.end_step(update=result.finite)
        index_losses.end_step()
        outcome.losses += [result.loss, *result.mtp_losses]
        outcome.norms.append(result.grad_norm)
        if step == 0:
            outcome.gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizers.step()
        optimizers.zero_grad()
    outcome.weights = {name: whole(p) for name, p in model.named_parameters()}
    outcome.moved = {name: float((outcome.weights[name] - value).norm()) for name, value in start.items()}
    kept = model.whole.state_dict()
    outcome.weights |= {name: whole(buffer) for name, buffer in model.whole.named_buffers() if name in kept}
    if any(mesh.rank(axis) for axis in ("batch", "cp", "tp")):  # whole tensors are the same on these ranks
        outcome.initial, outcome.gradients, outcome.weights = {}, {}, {}
    return outcome


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def _furthest(
    found: dict[str, Tensor], expected: dict[str, Tensor], norms: Mapping[str, float]
) -> tuple[float, str]:
    """The largest |difference| / |expected|, which counts as no less than what `norms` says.

    A parameter without a gradient on one side only is infinitely far.
    """
    worst, name = 0.0, ""
    for key in {**found, **expected}:
        if key not in found or key not in expected:
            return float("inf"), key
        least = max(1e-6 * expected[key].numel() ** 0.5, norms.get(key, 0.0))
        scale = expected[key].norm().clamp(min=least)
        distance = float((found[key] - expected[key]).norm() / scale)
        if not distance <= worst:  # also NaN
            worst, name = distance, key
    return worst, name
