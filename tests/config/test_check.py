from __future__ import annotations

from dataclasses import replace

import pytest

from nanovl.config.check import check_job
from nanovl.config.schema import Job, OptimizerGroup, Source


def job(**sections: dict[str, object]) -> Job:
    base = Job()
    base.data.sources = [Source(kind="stdlib", holdout=0.1)]
    return replace(
        base, **{name: replace(getattr(base, name), **fields) for name, fields in sections.items()}
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tensor", "context", "pipeline"])
def test_no_degree_is_nothing_to_divide_by(name: str) -> None:
    found = check_job(job(parallelism={f"{name}_parallel_degree": 0}), 8)
    assert found == [f"parallelism.{name}_parallel_degree = 0: wants 1 or more"]


def test_a_plain_job_has_no_mistakes() -> None:
    assert check_job(job(), 1) == []
    assert check_job(job(), 8) == []


@pytest.mark.parametrize(
    ("sections", "world", "expected"),
    [
        (
            {"training": {"global_batch_size": 500, "local_batch_size": 4}},
            8,
            "training.global_batch_size = 500 is not a multiple of 8 ranks x 4 rows = 32; "
            "use 480 or 512, or set training.local_batch_size",
        ),
        (
            {"training": {"global_batch_size": 3, "local_batch_size": 4}},
            1,
            "training.global_batch_size = 3 is not a multiple of 1 ranks x 4 rows = 4; "
            "use 4, or set training.local_batch_size",
        ),
        (
            {"training": {"global_batch_size": 10, "local_batch_size": 0}},
            4,
            "training.global_batch_size = 10 is not a multiple of 4 ranks; use 8 or 12",
        ),
        ({"training": {"local_batch_size": 0}}, 1, "training.local_batch_size are both 0; set one"),
        (
            {"parallelism": {"data_parallel_replicate_degree": 3}},
            8,
            "parallelism.data_parallel_replicate_degree = 3 does not divide the 8 ranks; use 2 or 4",
        ),
        (
            {"parallelism": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 3}},
            8,
            "parallelism: data_parallel_replicate_degree 2 x data_parallel_shard_degree 3 = 6, "
            "but the job has 8 ranks; launch that many, or set data_parallel_shard_degree = -1",
        ),
        (
            {"parallelism": {"data_parallel_shard_degree": 0}},
            1,
            "parallelism.data_parallel_shard_degree = 0: wants 1 or more, or -1 for all that are left",
        ),
        ({"tokenizer": {"vocab_size": 100}}, 1, "wants at least 265 (256 bytes and 9 special tokens)"),
        ({"data": {"sources": []}}, 1, "data.sources: empty; add [[data.sources]]"),
        (
            {"data": {"sources": [Source(kind="text")]}},
            1,
            'data.sources.0.path: empty; name the file or folder of kind "text"',
        ),
        (
            {"data": {"sources": [Source(kind="stdlib", weight=0.0)]}},
            1,
            "data.sources.0.weight = 0.0: wants a number above 0",
        ),
        (
            {"data": {"sources": [Source(kind="stdlib", path="x")]}},
            1,
            'kind "stdlib" needs none; leave it out',
        ),
        (
            {"validation": {"sources": [Source(kind="tokens", path="x")]}},
            1,
            'kind "tokens" holds no text to count',
        ),
        ({"data": {"sources": [Source(kind="stdlib")]}}, 1, "validation.freq: there is no held-out text"),
        (
            {"data": {"sources": [Source(kind="tokens", path="x", holdout=0.1)]}},
            1,
            "tokenizer.path: empty, but a source",
        ),
        (
            {"lr_schedule": {"decay_ratio": 1.5}},
            1,
            "lr_schedule.decay_ratio = 1.5: wants a number from 0 to 1",
        ),
        ({"training": {"seq_len": 0}}, 1, "training.seq_len = 0: wants a number above 0"),
        ({"optimizer": {"lr": -1.0}}, 1, "optimizer.lr = -1.0: wants 0 or more"),
        (
            {"optimizer": {"groups": [OptimizerGroup(match="(")]}},
            1,
            "optimizer.groups.0.match = '(': not a regular expression",
        ),
        (
            {"optimizer": {"groups": [OptimizerGroup(match="x", lr=-1)]}},
            1,
            "optimizer.groups.0.lr = -1: wants 0 or more",
        ),
        (
            {"optimizer": {"groups": [OptimizerGroup(match="x", beta2=2.0)]}},
            1,
            "optimizer.groups.0.beta2 = 2.0: wants a number from 0 to 1",
        ),
    ],
)
def test_each_rule_names_key_value_and_remedy(
    sections: dict[str, dict[str, object]], world: int, expected: str
) -> None:
    found = check_job(job(**sections), world)
    assert any(expected in line for line in found), found


def test_qk_clip_needs_all_keys_and_a_bound_above_zero() -> None:
    bad = job()
    bad.optimizer.muon.qk_clip = -1.0
    assert check_job(bad, 1) == ["optimizer.muon.qk_clip = -1.0: wants 0 or more"]
    bad.optimizer.muon.qk_clip = 100.0
    assert check_job(bad, 1) == []
    bad.parallelism.context_parallel_degree = 2
    assert any("optimizer.muon.qk_clip = 100.0: cannot see the logits" in line for line in check_job(bad, 2))


def test_polar_express_has_five_steps() -> None:
    bad = job()
    bad.optimizer.muon.iterations = 6
    assert "polar_express has coefficients for 5" in check_job(bad, 1)[0]
    bad.optimizer.muon.orthogonalization = "newton_schulz"
    assert check_job(bad, 1) == []
