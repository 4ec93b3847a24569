"""nanochat's size rules: from a model's size to its horizon, batch, learning rates and weight decay.

All values were tuned at depth 12 and are carried to other sizes by these rules (July 2026):

    tokens         D  = ratio * N                              N = matrices of the blocks + output head
    batch          B  = 2^round(log2(2^19 (D / D12)^0.383))    tokens a step; arXiv:2505.13738
    learning rates    * sqrt(B / 2^19), tables and head also * (hidden / 768)^-0.5
    weight decay      * sqrt(B / 2^19) * D12 / D               arXiv:2405.13698

The decay rule explodes for small models (1.89 at depth 4, from a base of 0.28). So D12 / D is held at
depth 8's value below it; depth 8 and above follow the rule exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, sqrt

REFERENCE_PARAMETERS = 110_100_912
"""N of the depth-12 model: matrices of the blocks and output head."""
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_HIDDEN_SIZE = 768
BATCH_EXPONENT = 0.383
SMALLEST_FOR_DECAY = 41_943_232
"""N of the depth-8 model, below which the weight-decay rule is not followed."""


@dataclass(frozen=True)
class SizeRules:
    """What the rules give for one model; factors multiply the values tuned at depth 12."""

    tokens: int
    batch_tokens: int
    steps: int
    width_factor: float
    """For learning rates of groups with `scale_with_width`."""
    batch_factor: float
    """For learning rates of groups with `scale_with_batch`."""
    decay_factor: float
    """For weight decay."""


def size_rules(parameters: int, hidden_size: int, ratio: float, batch_tokens: int = 0) -> SizeRules:
    """The rules for a model of `parameters` (blocks' matrices + output head) at `ratio` tokens per parameter.

    `batch_tokens` overrules the batch of the rule; 0 = the rule's.
    """
    tokens = horizon_tokens(parameters, ratio)
    batch = batch_tokens or optimal_batch_tokens(parameters)
    return SizeRules(
        tokens=tokens,
        batch_tokens=batch,
        steps=tokens // batch,
        width_factor=width_factor(hidden_size),
        batch_factor=batch_factor(batch),
        decay_factor=decay_factor(parameters, batch),
    )


def horizon_tokens(parameters: int, ratio: float) -> int:
    """Training tokens at `ratio` a parameter."""
    return int(ratio * parameters)


def optimal_batch_tokens(parameters: int) -> int:
    """Tokens a step, a power of two: grows with the horizon to the 0.383."""
    return 2 ** round(log2(REFERENCE_BATCH_TOKENS * (parameters / REFERENCE_PARAMETERS) ** BATCH_EXPONENT))


def batch_factor(batch_tokens: int) -> float:
    """Factor on learning rates: the square root of the batch's growth."""
    return sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)


def width_factor(hidden_size: int) -> float:
    """Factor on the learning rates of tables and head: falls with the root of the width."""
    return (hidden_size / REFERENCE_HIDDEN_SIZE) ** -0.5


def decay_factor(parameters: int, batch_tokens: int) -> float:
    """Factor on weight decay, its size part held at depth 8's for smaller models."""
    return batch_factor(batch_tokens) * REFERENCE_PARAMETERS / max(parameters, SMALLEST_FOR_DECAY)
