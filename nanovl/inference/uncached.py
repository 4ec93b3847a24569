"""Samples through a model that is cut over ranks by tensor, context or pipeline parallelism.

The engine's cache belongs to one rank's whole layers. Here every new token runs its whole row through the model as
training does: slow, and right on any mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanovl.dist import all_reduce
from nanovl.inference.engine import ids_without_text
from nanovl.inference.request import Completion
from nanovl.inference.sampling import choose, random_source
from nanovl.inference.stream import decode_text
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.spec import IGNORE_INDEX, Batch
from nanovl.tokenizer.bpe import AnyTokenizer

# B rows, T tokens, D model, V vocabulary


def generate_uncached(
    model: ParallelModel,
    tokenizer: AnyTokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[Completion]:
    """Continue every prompt, as Engine.generate does; all ranks call it and get the same."""
    prompt_ids = [tokenizer.encode(prompt, bos=tokenizer.bos_id is not None) for prompt in prompts]
    sources = [random_source(seed, 0, ids) for ids in prompt_ids]
    excluded_V = ids_without_text(tokenizer, int(model.config.vocab_size), model.device)
    stops = set(tokenizer.special_ids.values())
    unit = 2 * model.mesh.size("cp") * model.mesh.size("tp")
    length = -(-(max(map(len, prompt_ids)) + max_tokens) // unit) * unit
    ids = [list(row) for row in prompt_ids]
    found: list[list[tuple[int, float, float]]] = [[] for _ in ids]
    model.train(False)
    for _ in range(max_tokens):
        running = [b for b, row in enumerate(ids) if not (found[b] and row[-1] in stops)]
        if not running:
            break
        logits_BV = model.evaluate(_whole_rows(ids, length, model.device), _last_logits(model))
        chosen = torch.zeros(3, len(ids), dtype=torch.float64, device=model.device)
        # one rank draws; the others may lack the logits, and rounding must not drive ranks apart
        if logits_BV is not None and all(model.mesh.rank(axis) == 0 for axis in ("batch", "cp", "tp")):
            choice = choose(logits_BV, [(temperature, top_k, 1.0)] * len(ids), sources, excluded_V)
            parts = (choice.ids_B, choice.logprobs_B, choice.sampling_logprobs_B)
            chosen = torch.stack([part.double() for part in parts])
        for b, (token, logprob, sampling) in enumerate(all_reduce(chosen).T.tolist()):
            if b in running:
                ids[b].append(int(token))
                found[b].append((int(token), logprob, sampling))
    model.train(True)
    return [_completion(tokenizer, *pair, stops) for pair in zip(prompt_ids, found, strict=True)]


def _whole_rows(ids: Sequence[Sequence[int]], length: int, device: torch.device) -> Batch:
    """Right-padded rows of one document each, and a mark on each row's last token."""
    tokens_BT = torch.zeros(len(ids), length, dtype=torch.long)
    last_BT = torch.zeros(len(ids), length)
    for b, row in enumerate(ids):
        tokens_BT[b, : len(row)] = torch.tensor(row)
        last_BT[b, len(row) - 1] = 1.0
    batch = {
        "tokens_BT": tokens_BT,
        "targets_BT": torch.full_like(tokens_BT, IGNORE_INDEX),
        "positions_BT": torch.arange(length).expand_as(tokens_BT),
        "doc_ids_BT": torch.zeros_like(tokens_BT),
        "weights_BT": last_BT,
    }
    return {key: value.to(device) for key, value in batch.items()}


def _last_logits(model: ParallelModel) -> Any:
    """Objective: logits [B, V] after each row's marked token, wherever in the context group it is."""

    def objective(head: Any, x_BTD: Tensor, batch: Batch) -> Tensor:
        x_BD = torch.einsum("btd,bt->bd", x_BTD, batch["weights_BT"].to(x_BTD.dtype))
        if (group := model.mesh.group("cp")) is not None:
            all_reduce(x_BD, group=group)
        return head(x_BD)

    return objective


def _completion(
    tokenizer: AnyTokenizer, prompt_ids: list[int], found: list[tuple[int, float, float]], stops: set[int]
) -> Completion:
    ids = [token for token, *_ in found]
    stopped = ids[-1] in stops
    return Completion(
        prompt_ids=prompt_ids,
        ids=ids,
        text=decode_text(tokenizer, ids[:-1] if stopped else ids),
        logprobs=[logprob for _, logprob, _ in found],
        sampling_logprobs=[sampling for *_, sampling in found],
        finish_reason="stop" if stopped else "length",
    )
