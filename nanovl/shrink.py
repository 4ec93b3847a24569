"""A job's small likeness: the same mesh, schedule, optimizer and layer kinds, in widths that a laptop runs at once.

Sizes are recognised by the names of config fields, which are the same in every family. What a degree divides stays
divisible by it, and what it does not stays so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from nanovl.config.check import data_parallel_degree
from nanovl.config.schema import Compile, Job

HEAD_DIM = 16
SMALL = {
    "hidden_size": 64,
    "head_dim": HEAD_DIM,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "key_head_dim": 16,
    "value_head_dim": 16,
    "index_n_heads": 16,  # with fewer, scores tie at 0, and rounding chooses the keys
    "index_head_dim": 16,
    "short_window_multiple": 8,
}
"""Widths that no degree divides."""


def shrink(job: Job, config: Any, world_size: int) -> Job:
    """`job`, whose model has `config`, as small as its mesh allows; all sizes are set."""
    p = job.parallelism
    unit = (2 * p.context_parallel_degree) * p.tensor_parallel_degree
    seq_len = unit * max(1, -(-32 // unit))
    layers, per_stage = _layers(job, config)
    small = _shrunk(config, job, seq_len, layers)
    training = replace(
        job.training,
        seq_len=seq_len,
        # micro-batches enough for every schedule, one row each
        global_batch_size=2 * data_parallel_degree(job, world_size) * p.pipeline_parallel_degree,
        local_batch_size=1,
        mixed_precision_param="float32",
        steps=10,
    )
    overrides = {field.name: value for field, value in _values(small) if field.name != "vocab_size"}
    return replace(
        job,
        model=replace(job.model, overrides={k: _plain(v) for k, v in overrides.items()}),
        tokenizer=replace(job.tokenizer, path="", vocab_size=64 * p.tensor_parallel_degree),
        checkpoint=replace(
            job.checkpoint, initial_load_path="", initial_load_grow=False
        ),  # none are so small
        training=training,
        optimizer=replace(job.optimizer, scaling="none"),
        lr_schedule=replace(job.lr_schedule, warmup_steps=0),  # weights are to move
        parallelism=replace(p, pipeline_parallel_layers=per_stage),
        compile=Compile(enable="off"),
    )


def _layers(job: Job, config: Any) -> tuple[int, list[int]]:
    """Layers of the likeness, and of each stage where the job says so."""
    p = job.parallelism
    if p.pipeline_parallel_layers:
        counts = [min(count, 2) for count in p.pipeline_parallel_layers]
        return sum(counts), counts
    interleaves = p.pipeline_parallel_schedule not in ("GPipe", "1F1B")
    stages = p.pipeline_parallel_degree * (p.pipeline_parallel_stages_per_rank or (2 if interleaves else 1))
    kinds = sum(len(getattr(config, name, ())) for name in ("prefix", "pattern", "suffix"))
    return min(int(config.num_hidden_layers), max(4, stages, kinds)), []


def _shrunk(config: Any, job: Job, seq_len: int, layers: int) -> Any:
    """A copy of a config dataclass, or of what it holds, with small sizes."""
    if isinstance(config, dict):
        return {key: _shrunk(value, job, seq_len, layers) for key, value in config.items()}
    if isinstance(config, list):
        return [_shrunk(value, job, seq_len, layers) for value in config]
    return config if not dataclasses.is_dataclass(config) else _shrunk_fields(config, job, seq_len, layers)


def _shrunk_fields(config: Any, job: Job, seq_len: int, layers: int) -> Any:
    p = job.parallelism
    changes: dict[str, Any] = {}
    for field, value in _values(config):
        if field.name in ("num_hidden_layers", "depth"):
            changes[field.name] = layers
        elif field.name in SMALL and isinstance(value, int):
            changes[field.name] = min(value, SMALL[field.name]) if value > 0 else value
        elif field.name.endswith("intermediate_size") and isinstance(value, int) and value > 0:
            changes[field.name] = 16 * p.tensor_parallel_degree
        elif field.name == "num_experts":
            # a token's experts are all in the groups that it may choose from
            active = config.num_experts_per_tok * config.n_group // config.topk_group
            wanted = (p.expert_parallel_degree, config.n_group)
            changes[field.name] = _smallest(value, wanted, max(4, active))
        elif field.name in ("sliding_window", "attn_temperature_len", "index_topk") and value:
            changes[field.name] = min(value, seq_len // 4)
        elif field.name == "max_position_embeddings":
            changes[field.name] = seq_len
        elif dataclasses.is_dataclass(value) or isinstance(value, dict | list):
            changes[field.name] = _shrunk(value, job, seq_len, layers)
    if hasattr(config, "num_key_heads"):  # of Gated DeltaNet: there values have more heads than keys
        changes["num_value_heads"], changes["num_key_heads"] = _heads(
            config.num_value_heads, config.num_key_heads, p.tensor_parallel_degree, 1
        )
    heads = getattr(config, "num_attention_heads", 0)
    if heads:
        kv = getattr(config, "num_key_value_heads", 0) or heads
        small_heads, small_kv = _heads(heads, kv, p.tensor_parallel_degree, p.context_parallel_degree)
        for name, value in (("num_attention_heads", small_heads), ("num_key_value_heads", small_kv)):
            if any(field.name == name and old for field, old in _values(config)):
                changes[name] = value
        if hasattr(config, "aspect_ratio"):  # width comes from depth
            changes["aspect_ratio"] = -(-small_heads * HEAD_DIM // layers)
    return replace(config, **changes)


def _heads(heads: int, kv_heads: int, tp: int, cp: int) -> tuple[int, int]:
    small_kv = _smallest(kv_heads, (tp, tp * cp), min(2, kv_heads))
    group = heads // kv_heads
    fits = [n for n in range(min(2, group), group + 1) if _alike(small_kv * n, heads, (tp, tp * cp))]
    return small_kv * (fits[0] if fits else group), small_kv


def _smallest(size: int, units: tuple[int, ...], least: int) -> int:
    """The smallest number from `least` on that `units` divide, and are divided by, just where `size` is."""
    return next((n for n in range(least, size) if _alike(n, size, units)), size)


def _alike(a: int, b: int, units: tuple[int, ...]) -> bool:
    return all((a % u == 0, u % a == 0) == (b % u == 0, u % b == 0) for u in units)


def _values(config: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    return [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
