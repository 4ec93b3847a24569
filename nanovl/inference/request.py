"""What goes into the engine and what comes out of it, as plain data."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from nanovl.errors import NanovlError

MIN_TEMPERATURE = 1e-5
"""At this one only the largest logit counts; far below, dividing by it leaves float32."""

FinishReason = Literal["stop", "length", "context"]
"""A stop id was chosen; the request's own limit is reached; the engine's context is full."""


class RequestError(NanovlError, ValueError):
    """A request that cannot be served as it is; the message says what to change."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue. Two equal requests give equal tokens, whatever else the engine works on."""

    prompt_ids: list[int]
    max_tokens: int
    """New tokens at most."""
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int = 0
    """Candidates kept; 0 = all."""
    top_p: float = 1.0
    """Probability of the candidates kept; 1 = all."""
    seed: int = 0
    sample: int = 0
    """Which of several samples of one prompt and seed; each draws its own random numbers."""
    stop_ids: Collection[int] = field(default_factory=frozenset)
    """Ids that end the text; the one chosen is the last of the completion's ids."""


@dataclass(frozen=True)
class Event:
    """One token chosen for one request."""

    request: int
    """Number that `Engine.add` returned."""
    token_id: int
    logprob: float
    """Nats, under the model's own distribution (softmax of its raw logits)."""
    sampling_logprob: float
    """Nats, under the distribution drawn from: after temperature, top-k and top-p; 0 when greedy."""
    finish_reason: FinishReason | None
    """Set with the request's last token."""


@dataclass(frozen=True)
class Completion:
    """One request, finished."""

    prompt_ids: list[int]
    ids: list[int]
    """New tokens; where the reason is `stop`, the last one is the stop id."""
    text: str
    """Text of `ids` without the stop id; empty without a tokenizer."""
    logprobs: list[float]
    """Of each token, as in Event."""
    sampling_logprobs: list[float]
    finish_reason: FinishReason


def check_request(request: Request, context_tokens: int, vocab_size: int) -> None:
    """Raises RequestError with everything that is wrong."""
    prompt, wrong = request.prompt_ids, []
    if not prompt:
        wrong.append("prompt_ids is empty: give at least one token, such as the tokenizer's bos")
    if len(prompt) > context_tokens:
        wrong.append(
            f"prompt_ids has {len(prompt)} tokens, the context holds {context_tokens}: shorten the prompt, "
            "or give the engine a larger max_tokens"
        )
    outside = [i for i in prompt if not 0 <= i < vocab_size]
    if outside:
        wrong.append(
            f"prompt_ids holds {outside[0]}, outside the model's vocabulary of {vocab_size}: encode the text "
            "with the model's own tokenizer"
        )
    if request.max_tokens < 1:
        wrong.append(f"max_tokens = {request.max_tokens}: wants 1 or more")
    if request.temperature != 0 and not MIN_TEMPERATURE <= request.temperature < math.inf:
        wrong.append(f"temperature = {request.temperature}: wants 0 (greedy), or {MIN_TEMPERATURE} or more")
    if request.top_k < 0:
        wrong.append(f"top_k = {request.top_k}: wants 1 or more, or 0 for all tokens")
    if not 0.0 < request.top_p <= 1.0:
        wrong.append(f"top_p = {request.top_p}: wants a number above 0 and up to 1, where 1 keeps all tokens")
    if wrong:
        raise RequestError("request: " + "\n  ".join(wrong))
