from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanovl.errors import NanovlError
from nanovl.inference.engine import Engine
from nanovl.inference.request import Completion, Event, Request, RequestError
from nanovl.inference.sampling import candidates
from nanovl.tokenizer.bpe import Tokenizer

BuildModel = Callable[..., nn.Module]
FAMILIES = ("nanochat", "nanochat_v1", "qwen3", "qwen3_windowed", "qwen3_5")
SAMPLING: dict[str, Any] = {"temperature": 1.3, "top_k": 40, "top_p": 0.95}


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def logits_after(model: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """The full forward's logits from which each of `ids` was chosen, [T, V]."""
    return model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def finish(engine: Engine) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            found.setdefault(event.request, []).append(event)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill_tokens", [512, 7])
def test_greedy_equals_the_full_forward(build_model: BuildModel, family: str, prefill_tokens: int) -> None:
    model, texts = build_model(family), prompts(1, 23, 3, 40, 12)  # more requests than slots
    engine = Engine(model, max_rows=2, prefill_tokens=prefill_tokens)
    completions = engine.generate(texts, max_tokens=14)
    for prompt, completion in zip(texts, completions, strict=True):
        assert completion.ids == greedy(model, prompt, 14)
        assert len(set(completion.ids)) > 4, "a model that repeats itself shows nothing"
    assert engine.memory().slots == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_the_full_forward(build_model: BuildModel, family: str) -> None:
    model, texts = build_model(family), prompts(5, 30, 2)
    # a memory updated token by token rounds otherwise than one updated by chunks: 1.1e-5 on some processors
    limit = 5e-5 if family == "qwen3_5" else 1e-5
    for prompt, done in zip(texts, Engine(model).generate(texts, max_tokens=20, **SAMPLING), strict=True):
        logits, at = logits_after(model, prompt, done.ids), (torch.arange(20), torch.tensor(done.ids))
        assert (logits.log_softmax(-1)[at] - torch.tensor(done.logprobs)).abs().max() < limit
        drawn_from = candidates(logits, 1.3, 40, 0.95).log_softmax(-1)[at]
        assert (drawn_from - torch.tensor(done.sampling_logprobs)).abs().max() < 1e-4
        assert min(done.sampling_logprobs) < -0.1


def test_greedy_sampling_has_probability_one(build_model: BuildModel) -> None:
    completion = Engine(build_model("qwen3")).generate(prompts(4), max_tokens=5)[0]
    assert completion.sampling_logprobs == [0.0] * 5
    assert max(completion.logprobs) < 0


def test_a_request_gets_the_same_tokens_in_any_company(build_model: BuildModel) -> None:
    model, texts = build_model("nanochat"), prompts(6, 19, 2, 33)
    settings = {"max_tokens": 16, "seed": 3, **SAMPLING}
    together = Engine(model).generate(texts, **settings)
    for prompt, completion in zip(texts, together, strict=True):
        assert Engine(model).generate([prompt], **settings)[0].ids == completion.ids
    engine = Engine(model, max_rows=2)
    engine.add(Request(prompt_ids=texts[3], max_tokens=9, temperature=2.0, seed=8))
    engine.step()
    engine.step()
    late = engine.add(Request(prompt_ids=texts[1], **settings))
    assert [event.token_id for event in finish(engine)[late]] == together[1].ids
    assert Engine(model).generate([texts[1]], **{**settings, "seed": 4})[0].ids != together[1].ids


def test_samples_of_one_prompt_differ_from_their_first_token(build_model: BuildModel) -> None:
    completions = Engine(build_model("nanochat")).generate(prompts(6) * 8, max_tokens=1, temperature=1.0)
    assert len({completion.ids[0] for completion in completions}) > 2


def test_samples_can_be_asked_for_one_by_one(build_model: BuildModel) -> None:
    model, prompt = build_model("nanochat"), prompts(6)[0]
    completions = Engine(model).generate([prompt] * 3, max_tokens=6, seed=2, **SAMPLING)
    engine = Engine(model)
    number = engine.add(Request(prompt_ids=prompt, max_tokens=6, seed=2, sample=2, **SAMPLING))
    assert [event.token_id for event in finish(engine)[number]] == completions[2].ids


def test_a_text_ends_at_a_stop_id_its_limit_or_the_context(build_model: BuildModel) -> None:
    model, prompt = build_model("qwen3"), prompts(10)[0]
    free = greedy(model, prompt, 8)
    stop = next(i for i in free[2:] if free.index(i) >= 2)
    stopped, full = (
        Engine(model).generate([prompt], max_tokens=8, stop_ids={stop})[0],
        Engine(model, max_tokens=12),
    )
    assert (stopped.ids, stopped.finish_reason) == (free[: free.index(stop) + 1], "stop")
    assert len(stopped.logprobs) == len(stopped.ids)
    assert Engine(model).generate([prompt], max_tokens=8)[0].finish_reason == "length"
    # 12 tokens are read, prompt and answer together; the last one chosen is not
    completion = full.generate([prompt], max_tokens=8)[0]
    assert (completion.ids, completion.finish_reason) == (free[:3], "context")
    assert full.generate([prompt + free[:2]], max_tokens=8)[0].ids == free[2:3]


def test_requests_join_as_slots_become_free(build_model: BuildModel) -> None:
    engine = Engine(build_model("qwen3"), max_rows=2)
    first, second, third = (
        engine.add(Request(prompt_ids=prompt, max_tokens=limit))
        for prompt, limit in zip(prompts(3, 5, 4), (3, 1, 2), strict=True)
    )
    shown = []
    while engine.busy:
        shown.append([event.request for event in engine.step()])
    # both prompts; the third one's, in the slot of the second; then one token each
    assert shown == [[first, second], [third], [first, third], [first]]
    assert engine.memory().slots == 2


def test_a_cancelled_request_leaves_no_trace(build_model: BuildModel) -> None:
    model, texts = build_model("nanochat"), prompts(20, 9, 4)
    engine = Engine(model, max_rows=2)
    gone, stays, waits = (engine.add(Request(prompt_ids=prompt, max_tokens=6)) for prompt in texts)
    engine.step()
    engine.cancel(gone)
    found = finish(engine)
    engine.cancel(gone)
    assert gone not in found
    assert [event.token_id for event in found[stays]] == greedy(model, texts[1], 6)[1:]
    assert [event.token_id for event in found[waits]] == greedy(model, texts[2], 6)


def test_stream_gives_tokens_one_by_one_and_cleans_up(build_model: BuildModel) -> None:
    model, prompt = build_model("qwen3"), prompts(5)[0]
    engine = Engine(model)
    stream = engine.stream(Request(prompt_ids=prompt, max_tokens=6))
    assert [next(stream).token_id, next(stream).token_id] == greedy(model, prompt, 2)
    stream.close()
    assert not engine.busy
    assert [event.finish_reason for event in engine.stream(Request(prompt_ids=prompt, max_tokens=2))] == [
        None,
        "length",
    ]


def test_text_is_encoded_with_bos_and_decoded_without_the_stop(build_model: BuildModel) -> None:
    tokenizer = Tokenizer([(b"a", b"b")])  # 256 bytes, one merge, 9 special tokens
    model = build_model("qwen3", vocab_size=300)
    engine = Engine(model, tokenizer)
    assert engine.encode("ab") == [tokenizer.bos_id, 256]
    free = engine.generate(["ab"], max_tokens=30, temperature=1.0, stop_ids=())[0]
    assert free.prompt_ids == [tokenizer.bos_id, 256]
    assert free.text == tokenizer.decode(free.ids)
    stopped = engine.generate(["ab"], max_tokens=30, temperature=1.0, stop_ids=free.ids[4:5])[0]
    shorter = stopped.ids[:-1]
    assert stopped.ids == free.ids[: len(stopped.ids)]
    assert stopped.text == tokenizer.decode(shorter)


def test_special_tokens_end_a_text_unless_told_otherwise(build_model: BuildModel) -> None:
    tokenizer = Tokenizer([])
    model = build_model("qwen3", vocab_size=265, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[260] = 50 * model.lm_head.weight[260]  # likely in either sign, sooner or later
    engine = Engine(model, tokenizer)
    completion = engine.generate(["x"], max_tokens=30)[0]
    assert completion.finish_reason == "stop"
    assert completion.ids[-1] == 260
    assert engine.generate(["x"], max_tokens=30, stop_ids=())[0].finish_reason == "length"


def test_an_id_that_the_tokenizer_does_not_know_is_never_chosen(build_model: BuildModel) -> None:
    tokenizer, model = Tokenizer([]), build_model("qwen3", vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight[265:] *= 20
    ids = Engine(model).generate([[1]] * 4, max_tokens=8)[0].ids
    assert max(ids) >= 265
    for temperature in (0.0, 1.0):
        completion = Engine(model, tokenizer).generate(
            [[1]], max_tokens=30, temperature=temperature, stop_ids=()
        )[0]
        assert max(completion.ids) < 265
        logits = logits_after(model, [1], completion.ids).log_softmax(-1)
        expected = logits[torch.arange(30), torch.tensor(completion.ids)]
        torch.testing.assert_close(expected, torch.tensor(completion.logprobs), rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_make_a_bfloat16_cache(build_model: BuildModel) -> None:
    model = build_model("qwen3").bfloat16()
    engine = Engine(model)
    done = engine.generate(prompts(9, 4), max_tokens=10)
    assert engine.memory().bytes_per_token == 3 * 2 * 4 * 16 * 2
    for completion in done:
        logits = logits_after(model, completion.prompt_ids, completion.ids).log_softmax(-1)
        expected = logits[torch.arange(10), torch.tensor(completion.ids)]
        assert (expected - torch.tensor(completion.logprobs)).abs().max() < 0.2  # 2^-8 of logits near 10


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_the_tokens_of_the_cpu(build_model: BuildModel, family: str) -> None:
    model, texts = build_model(family), prompts(1, 23, 3)
    settings = {"max_tokens": 14, **SAMPLING}
    expected = [c.ids for c in Engine(model).generate(texts, **settings)]
    assert [c.ids for c in Engine(model.cuda()).generate(texts, **settings)] == expected


def completion_of(engine: Engine, **settings: Any) -> Completion:
    return engine.generate([[1, 2, 3]], max_tokens=4, **settings)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids is empty: give at least one token"),
        ({"prompt_ids": [1] * 65}, "prompt_ids has 65 tokens, the context holds 64: shorten the prompt"),
        (
            {"prompt_ids": [1, 97]},
            "prompt_ids holds 97, outside the model's vocabulary of 97: encode the text with",
        ),
        ({"prompt_ids": [-1]}, "prompt_ids holds -1, outside"),
        ({"max_tokens": 0}, "max_tokens = 0: wants 1 or more"),
        ({"temperature": -0.5}, "temperature = -0.5: wants 0"),
        ({"temperature": 1e-6}, "temperature = 1e-06: wants 0 .greedy., or 1e-05 or more"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1: wants 1 or more, or 0"),
        ({"top_p": 0.0}, "top_p = 0.0: wants a number above 0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_p": float("nan")}, "top_p = nan"),
    ],
)
def test_a_wrong_request_is_refused(build_model: BuildModel, change: dict[str, Any], message: str) -> None:
    engine = Engine(build_model("qwen3"))
    with pytest.raises(RequestError, match=message):
        engine.add(replace(Request(prompt_ids=[1], max_tokens=4), **change))
    assert not engine.busy


def test_one_wrong_prompt_refuses_all(build_model: BuildModel) -> None:
    engine = Engine(build_model("qwen3"))
    with pytest.raises(ValueError, match=r"max_tokens = 0.*\n.*top_k = -2"):
        engine.generate([[1]], max_tokens=0, top_k=-2)
    with pytest.raises(RequestError, match="prompt_ids is empty"):
        engine.generate([[1], []])
    assert not engine.busy


def test_wrong_use_of_the_engine_is_refused(build_model: BuildModel) -> None:
    model = build_model("qwen3")
    for name in ("max_rows", "max_tokens", "prefill_tokens"):
        with pytest.raises(RequestError, match=f"Engine: {name} = -1: wants 1 or more"):
            Engine(model, **{name: -1})
    engine = Engine(model)
    with pytest.raises(RequestError, match="prompts is one text; give a list"):
        engine.generate("abc")
    with pytest.raises(RequestError, match="text needs a tokenizer"):
        engine.generate(["abc"])
    engine.add(Request(prompt_ids=[1], max_tokens=4))
    with pytest.raises(
        RequestError, match=r"Engine.generate: 1 requests are not finished; step\(\) while busy"
    ):
        completion_of(engine)
    with pytest.raises(RequestError, match=r"Engine.stream: 1 requests"):
        next(engine.stream(Request(prompt_ids=[1], max_tokens=4)))


def test_weights_that_are_not_finite_are_no_text(build_model: BuildModel) -> None:
    model = build_model("qwen3")
    engine = Engine(model)
    expected = completion_of(engine).ids
    with torch.no_grad():
        kept = model.norm.weight[0].clone()
        model.norm.weight[0] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(
            NanovlError, match=r"request \d: the model's logits after 3 tokens are not finite"
        ):
            completion_of(engine, temperature=temperature)
    assert not engine.busy
    with torch.no_grad():
        model.norm.weight[0] = kept
    assert completion_of(engine).ids == expected


def test_not_a_number_in_one_request_does_not_reach_the_next(build_model: BuildModel) -> None:
    model = build_model("qwen3")
    engine, texts = Engine(model), [[1, 2, 3], [4] * 30]
    with torch.no_grad():
        model.embed_tokens.weight[50] = float("nan")
    with pytest.raises(NanovlError, match="not finite"):
        engine.generate([[50] * 30])
    # the first text takes the slot, and reads beside its own places as many as the second one fills
    assert [c.ids for c in engine.generate(texts, max_tokens=4)] == [greedy(model, text, 4) for text in texts]
