"""Many requests through one model: one cached forward a step, each request with its own sampling.

A request waits, gets a slot, is fed its prompt in chunks, then one token a step, and gives the slot back when
it is done; others join at any step. The model may be the trainer's own, sharded by FSDP: then all ranks make
the same calls, and the first one's tokens count everywhere, so that rounding cannot drive them apart.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanovl.errors import NanovlError
from nanovl.inference.borrow import borrowed, mesh_of, release_gathered, same_everywhere
from nanovl.inference.cache import CacheMemory, Feed, KVCache
from nanovl.inference.load import Loaded
from nanovl.inference.request import (
    Completion,
    Event,
    FinishReason,
    Request,
    RequestError,
    check_request,
)
from nanovl.inference.sampling import choose, random_source
from nanovl.inference.stream import decode_text
from nanovl.tokenizer.bpe import AnyTokenizer

# B rows of a forward, T tokens, D model, V vocabulary


@dataclass
class Row:
    """A request inside the engine."""

    number: int
    request: Request
    source: torch.Generator
    ids: list[int]
    """The prompt, then what was chosen."""
    slot: int = -1
    """Its place in the cache; -1 while it waits."""
    cached: int = 0
    """Leading ids that the cache holds."""

    @property
    def pending(self) -> int:
        """Ids that the model has yet to see."""
        return len(self.ids) - self.cached


class Engine:
    """Continues token sequences with any module that has `nanovl.spec.Model.forward`.

    The model is changed only inside a step. Between steps it is as before, but that FSDP may hold gathered
    weights; after the last request it holds none.
    """

    def __init__(
        self,
        model: Loaded | nn.Module,
        tokenizer: AnyTokenizer | None = None,
        *,
        max_rows: int = 8,
        max_tokens: int = 0,
        prefill_tokens: int = 512,
    ) -> None:
        """`max_rows` requests run at once, each with room for `max_tokens`, prompt and answer together (0 =
        the context the model is meant for). A step feeds `prefill_tokens` of a prompt at most."""
        self.model = model.model if isinstance(model, Loaded) else model
        config: Any = self.model.config
        self.vocab_size = int(config.vocab_size)
        self.tokenizer = model.tokenizer if isinstance(model, Loaded) and tokenizer is None else tokenizer
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.max_tokens = max_tokens or int(config.max_position_embeddings)
        for name in ("max_rows", "max_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"Engine: {name} = {getattr(self, name)}: wants 1 or more")
        release_gathered(self.model)  # so that its parameters show how they are sharded
        self.mesh = mesh_of(self.model)
        self.device = next(self.model.parameters()).device
        self.without_text_V = ids_without_text(self.tokenizer, self.vocab_size, self.device)
        self.cache = KVCache(self.model)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._next_number = 0

    @property
    def busy(self) -> bool:
        """Whether some request is not finished."""
        return bool(self.waiting or self.running)

    def memory(self) -> CacheMemory:
        """What the cache takes by now."""
        return self.cache.memory()

    def add(self, request: Request) -> int:
        """Queue a request; returns the number that its events carry. Raises RequestError."""
        check_request(request, self.max_tokens, self.vocab_size)
        source = random_source(request.seed, request.sample, request.prompt_ids)
        self.waiting.append(Row(self._next_number, request, source, list(request.prompt_ids)))
        self._next_number += 1
        return self._next_number - 1

    def cancel(self, number: int) -> None:
        """Drop a request; nothing happens if it is finished."""
        self.waiting = deque(row for row in self.waiting if row.number != number)
        for row in [row for row in self.running if row.number == number]:
            self._release(row)

    def step(self) -> list[Event]:
        """One forward: of prompts while some are unread, else of the last token of every running request.

        Returns the tokens chosen, in the order of the requests; none while prompts need further steps. After
        an exception no request is left.
        """
        self._admit()
        if not self.running:
            return []
        try:
            unread = [row for row in self.running if row.pending > 1]
            rows = sorted(unread or self.running, key=lambda row: row.slot)
            logits_BV = self._forward(rows)
            ready = [b for b, row in enumerate(rows) if row.pending == 0]
            events = self._choose([rows[b] for b in ready], logits_BV[ready]) if ready else []
        except BaseException:  # also Ctrl-C: a forward cut short leaves half of its tokens in the cache
            for row in [*self.running, *self.waiting]:
                self.cancel(row.number)
            raise
        finally:
            if not self.busy:
                release_gathered(self.model)
        return sorted(events, key=lambda event: event.request)

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """The tokens of one request as they are chosen; closing the iterator drops it."""
        self._require_idle("stream")
        number = self.add(request)
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.cancel(number)
            release_gathered(self.model)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Collection[int] | None = None,
    ) -> list[Completion]:
        """Continue every prompt, text or ids; completions in the same order.

        A prompt gets the same tokens alone as among others; one given several times gets a sample of its own
        each time. `stop_ids` None = every special token of the tokenizer. Raises RequestError.
        """
        self._require_idle("generate")
        if isinstance(prompts, str):
            raise RequestError("generate: prompts is one text; give a list of texts, such as [prompt]")
        stops = frozenset(self.special_ids() if stop_ids is None else stop_ids)
        make = partial(
            Request, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        seen: dict[tuple[int, ...], int] = {}
        requests = []
        for prompt in prompts:
            ids = self.encode(prompt)
            sample = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
            requests.append(make(prompt_ids=ids, sample=sample, stop_ids=stops))
            check_request(requests[-1], self.max_tokens, self.vocab_size)
        events: dict[int, list[Event]] = {self.add(request): [] for request in requests}
        try:
            while self.busy:
                for event in self.step():
                    events[event.request].append(event)
        finally:
            for number in events:
                self.cancel(number)
            release_gathered(self.model)
        return [self._completion(*pair) for pair in zip(requests, events.values(), strict=True)]

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt: text after the tokenizer's bos, where it has one; ids as they are."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError(
                "prompt: text needs a tokenizer; give the engine one, or prompts as lists of ids"
            )
        return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)

    def special_ids(self) -> Collection[int]:
        """The tokenizer's special tokens, none of which stands inside a document."""
        return () if self.tokenizer is None else self.tokenizer.special_ids.values()

    def _admit(self) -> None:
        """Give free slots, the lowest first, to those who wait longest."""
        free = sorted(set(range(self.max_rows)) - {row.slot for row in self.running})
        for slot in free[: len(self.waiting)]:
            row = self.waiting.popleft()
            row.slot = slot
            self.running.append(row)
            self.cache.reserve(slot + 1, min(self.max_tokens, len(row.ids) + row.request.max_tokens - 1))

    def _release(self, row: Row) -> None:
        self.running.remove(row)
        self.cache.clear(row.slot)

    def _forward(self, rows: list[Row]) -> Tensor:
        """Feed pending ids of `rows`; returns the logits after each row's last one, [B, V] float32."""
        counts = [min(row.pending, self.prefill_tokens) for row in rows]
        feed = Feed([row.slot for row in rows], [row.cached for row in rows], counts, self.device)
        fed = [row.ids[row.cached : row.cached + count] for row, count in zip(rows, counts, strict=True)]
        padded = [ids + [0] * (max(counts) - len(ids)) for ids in fed]
        tokens_BT = torch.tensor(padded, device=self.device)

        def last_logits(head: nn.Module, x_BTD: Tensor) -> Tensor:
            return head(x_BTD[feed.last])

        with borrowed(self.model), self.cache.installed(feed):
            logits_BV: Tensor = self.model(tokens_BT, feed.positions_BT, objective=last_logits)
        for row, count in zip(rows, counts, strict=True):
            row.cached += count
        return logits_BV

    @torch.no_grad()
    def _choose(self, rows: list[Row], logits_BV: Tensor) -> list[Event]:
        """The next token of each row; a finished row gives its slot back."""
        choice = choose(
            logits_BV,
            [(row.request.temperature, row.request.top_k, row.request.top_p) for row in rows],
            [row.source for row in rows],
            self.without_text_V,
            partial(same_everywhere, mesh=self.mesh),
        )
        logprobs = torch.stack((choice.logprobs_B, choice.sampling_logprobs_B)).tolist()
        events = []
        for row, token_id, model, sampling in zip(rows, choice.ids_B.tolist(), *logprobs, strict=True):
            if not math.isfinite(model):
                raise NanovlError(
                    f"request {row.number}: the model's logits after {len(row.ids)} tokens are not finite: "
                    "its weights hold NaN or infinity, or its dtype is too narrow; try "
                    "float32 or an earlier checkpoint"
                )
            row.ids.append(token_id)
            reason = self._finish_reason(row)
            events.append(Event(row.number, token_id, model, sampling, reason))
            if reason is not None:
                self._release(row)
        return events

    def _finish_reason(self, row: Row) -> FinishReason | None:
        if row.ids[-1] in row.request.stop_ids:
            return "stop"
        if len(row.ids) - len(row.request.prompt_ids) == row.request.max_tokens:
            return "length"
        return "context" if len(row.ids) > self.max_tokens else None

    def _completion(self, request: Request, events: list[Event]) -> Completion:
        ids, reason = [event.token_id for event in events], events[-1].finish_reason
        assert reason is not None, "a completion of an unfinished request"
        shown = ids[:-1] if reason == "stop" else ids
        return Completion(
            prompt_ids=request.prompt_ids,
            ids=ids,
            text="" if self.tokenizer is None else decode_text(self.tokenizer, shown),
            logprobs=[event.logprob for event in events],
            sampling_logprobs=[event.sampling_logprob for event in events],
            finish_reason=reason,
        )

    def _require_idle(self, method: str) -> None:
        if self.busy:
            count = len(self.waiting) + len(self.running)
            raise RequestError(
                f"Engine.{method}: {count} requests are not finished; step() while busy, or cancel them"
            )


def ids_without_text(tokenizer: AnyTokenizer | None, vocab_size: int, device: torch.device) -> Tensor | None:
    """Entries of a model's vocabulary that the tokenizer knows nothing of, bool [V]: never chosen."""
    if tokenizer is None:
        return None
    without_V = torch.ones(vocab_size, dtype=torch.bool)
    lengths = torch.from_numpy(tokenizer.token_bytes())[:vocab_size]
    without_V[: len(lengths)] = lengths == 0
    without_V[[i for i in tokenizer.special_ids.values() if i < vocab_size]] = False
    return without_V.to(device) if without_V.any() else None
