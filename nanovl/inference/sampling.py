"""From logits to a token: pure functions over rows that share their settings.

A token is found by inverting the cumulative distribution at one uniform number of the request's generator. So
a token costs one number, whatever the vocabulary, and a CPU and a GPU draw the same ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# B rows, V vocabulary

Settings = tuple[float, int, float]
"""temperature (0 = greedy), top_k (0 = all), top_p (1 = all)."""


@dataclass(frozen=True)
class Choice:
    """One token a row."""

    ids_B: Tensor
    logprobs_B: Tensor
    """log softmax of the raw logits, float32."""
    sampling_logprobs_B: Tensor
    """Of the distribution that was drawn from, float32; 0 when greedy."""


def random_source(seed: int, sample: int, prompt_ids: Sequence[int]) -> torch.Generator:
    """The generator of one request: the same request draws the same numbers, in any company."""
    digest = hashlib.sha256(f"{seed}/{sample}/{','.join(map(str, prompt_ids))}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def uniform(generator: torch.Generator) -> float:
    """One number in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def candidates(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of the distribution to draw from, -inf where excluded: temperature, then top-k, then top-p."""
    logits_BV = logits_BV / temperature
    if top_k > 0:
        logits_BV = keep_top_k(logits_BV, top_k)
    return keep_top_p(logits_BV, top_p) if top_p < 1.0 else logits_BV


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """-inf below the k-th largest logit of each row; ties with it stay."""
    kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """-inf outside the smallest set of most likely tokens whose probabilities sum to `top_p` or more."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(dim=-1, dtype=torch.float64)
    sum_before_BV = probs_BV.cumsum(dim=-1) - probs_BV
    excluded_BV = torch.empty_like(order_BV, dtype=torch.bool).scatter_(-1, order_BV, sum_before_BV >= top_p)
    return logits_BV.masked_fill(excluded_BV, -math.inf)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds its uniform number; int64 [B].

    A token of probability 0 is never drawn.
    """
    cumulative_BV = logits_BV.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:].contiguous()
    # rounding must not lift the point onto the total, which no cumulative sum exceeds
    point_B1 = (uniform_B[:, None] * total_B1).minimum(total_B1.nextafter(torch.zeros_like(total_B1)))
    # only NaN leads past the end; the caller sees it in the log-probability
    return torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def logprobs_of(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """log softmax at `ids_B`, float32 [B]."""
    chosen_B = logits_BV.gather(-1, ids_B[:, None])[:, 0]
    return chosen_B - logits_BV.logsumexp(dim=-1)


def choose(
    logits_BV: Tensor,
    settings: Sequence[Settings],
    sources: Sequence[torch.Generator],
    excluded_V: Tensor | None = None,
    agree: Callable[[Tensor], None] | None = None,
) -> Choice:
    """The next token of every row, by its own settings and generator.

    `excluded_V` is true for tokens never to choose. `agree` may overwrite the chosen ids, before their
    log-probabilities are read.
    """
    allowed_BV = logits_BV if excluded_V is None else logits_BV.masked_fill(excluded_V, -math.inf)
    ids_B = allowed_BV.argmax(dim=-1)
    groups: dict[Settings, list[int]] = {}  # rows with equal settings are computed together
    for b, of_row in enumerate(settings):
        if of_row[0] > 0:
            groups.setdefault(of_row, []).append(b)
    drawn = [(group, candidates(allowed_BV[group], *of_rows)) for of_rows, group in groups.items()]
    for group, drawn_BV in drawn:
        uniform_B = torch.tensor([uniform(sources[b]) for b in group], dtype=torch.float64)
        ids_B[group] = draw(drawn_BV, uniform_B.to(ids_B.device))
    if agree is not None:
        agree(ids_B)
    sampling_logprobs_B = torch.zeros_like(ids_B, dtype=torch.float32)
    for group, drawn_BV in drawn:
        sampling_logprobs_B[group] = logprobs_of(drawn_BV, ids_B[group])
    return Choice(ids_B, logprobs_of(logits_BV, ids_B), sampling_logprobs_B)
