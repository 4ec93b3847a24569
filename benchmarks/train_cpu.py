"""Tokens per second of one training step on a CPU: ours against a plain loop over transformers' Qwen3ForCausalLM.

    python benchmarks/train_cpu.py [--width 384] [--pairs 5] [--out benchmarks]

Both train the same architecture on the same rows: float32 weights, AdamW (fused), gradient clipping, a new batch each
step. The plain loop's bfloat16 is autocast, as a user would write it. The two alternate within one process, a pair at
a time, and what is reported is the median of the ratios of a pair: the machine's mood cancels out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from nanovl import dist
from nanovl.config.schema import Job, Model
from nanovl.device import Modes, decide_modes, hardware, loss_chunk_tokens
from nanovl.log import Log, table
from nanovl.mesh import build_mesh
from nanovl.parallelisms.apply import parallelize
from nanovl.parallelisms.init import init_weights, materialize
from nanovl.registry import resolve_model
from nanovl.step import train_step

CPU = torch.device("cpu")
MODES = {
    "float32 eager": Modes(torch.float32, False),
    "float32 compiled": Modes(torch.float32, True),
    "bfloat16 eager": Modes(torch.bfloat16, False),
    "bfloat16 compiled": Modes(torch.bfloat16, True),
}


def sizes(width: int, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden": width,
        "layers": layers,
        "ffn": 3 * width,
        "heads": width // 64,
        "kv_heads": width // 128,
        "vocab": vocab,
    }


def our_step(size: dict[str, Any], modes: Modes, rows: int, seq_len: int) -> Callable[[], None]:
    mixer = {"num_attention_heads": size["heads"], "num_key_value_heads": size["kv_heads"], "head_dim": 64}
    overrides = {
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "blocks": {"full": {"mixer": mixer, "ffn": {"intermediate_size": size["ffn"]}}},
    }
    spec = resolve_model(Model(name="qwen3", flavor="debug", overrides=overrides), size["vocab"])
    with torch.device("meta"):
        model = spec.family.model(spec.config)
    job = Job()
    parallel = parallelize(model, job, build_mesh(job.parallelism, 1, CPU), modes, Log(1))
    materialize(model, CPU)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(seq_len).expand(rows, seq_len)

    def step() -> None:
        tokens = torch.randint(0, size["vocab"], (rows, seq_len + 1), generator=generator)
        batch = {
            "tokens_BT": tokens[:, :-1],
            "targets_BT": tokens[:, 1:],
            "positions_BT": positions,
            "doc_ids_BT": torch.zeros_like(positions),
            "weights_BT": torch.ones(rows, seq_len),
        }
        train_step(
            parallel,
            [batch],
            max_norm=1.0,
            chunk_tokens=loss_chunk_tokens(CPU, size["vocab"]),
            cross_document_attention=True,  # one document a row, as the plain loop takes it
        )
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(size: dict[str, Any], modes: Modes, rows: int, seq_len: int) -> Callable[[], None]:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        head_dim=64,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.Qwen3ForCausalLM(config)
    if modes.compile:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        tokens = torch.randint(0, size["vocab"], (rows, seq_len + 1), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=modes.param_dtype == torch.bfloat16):
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


def compare(
    a: Callable[[], None], b: Callable[[], None], pairs: int, repeats: int
) -> tuple[float, float, list[float]]:
    """Median seconds of a and of b, and b's over a's for every pair."""
    for step in (a, b):
        seconds(step, 2)  # compilation and first-touch
    taken = [(seconds(a, repeats), seconds(b, repeats)) for _ in range(pairs)]
    return (
        statistics.median(x for x, _ in taken),
        statistics.median(y for _, y in taken),
        [y / x for x, y in taken],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="steps a side of a pair")
    parser.add_argument("--only", default="", help="one mode, such as 'float32 eager'")
    parser.add_argument("--out", default="", help="folder for the .md and .json")
    args = parser.parse_args()
    dist.start(CPU)
    size = sizes(args.width, args.layers, args.vocab)
    tokens = args.rows * args.seq_len
    default = decide_modes(CPU, args.width, 10_000, "auto", "auto")
    modes = {k: v for k, v in MODES.items() if not args.only or k == args.only}
    rows, found = [], {}
    for name, mode in modes.items():
        torch._dynamo.reset()
        ours, plain = (make(size, mode, args.rows, args.seq_len) for make in (our_step, plain_step))
        fast, slow, ratios = compare(ours, plain, args.pairs, args.repeats)
        found[name] = {"ours": tokens / fast, "plain": tokens / slow, "ratios": ratios}
        rows.append(
            [
                name + (" (default)" if mode == default else ""),
                tokens / fast,
                tokens / slow,
                statistics.median(ratios),
            ]
        )
        print(f"{name}: ratios {', '.join(f'{r:.2f}' for r in ratios)}", flush=True)
    if len(modes) > 1:
        best = max(found, key=lambda name: found[name]["plain"])
        for label, other, mode in (
            ("our default / plain float32 eager", MODES["float32 eager"], default),
            (f"our default / plain's best ({best})", MODES[best], default),
        ):
            torch._dynamo.reset()
            ours, plain = (
                our_step(size, mode, args.rows, args.seq_len),
                plain_step(size, other, args.rows, args.seq_len),
            )
            fast, slow, ratios = compare(ours, plain, args.pairs, args.repeats)
            found[label] = {"ours": tokens / fast, "plain": tokens / slow, "ratios": ratios}
            rows.append([label, tokens / fast, tokens / slow, statistics.median(ratios)])
    print(table(["mode", "ours tok/s", "plain tok/s", "median ratio"], rows))
    if args.out:
        write(Path(args.out), args, rows, found)


def write(folder: Path, args: argparse.Namespace, rows: list[list[Any]], found: dict[str, Any]) -> None:
    machine = hardware(CPU)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    slug = "".join(c if c.isalnum() else "-" for c in machine.lower()).strip("-")
    stem = folder / f"train_cpu_{slug}_{time.strftime('%Y-%m-%d')}"
    shape = {k: getattr(args, k) for k in ("width", "layers", "vocab", "seq_len", "rows", "pairs", "repeats")}
    facts = {
        "hardware": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    stem.with_suffix(".json").write_text(
        json.dumps({**facts, "commit": commit, **shape, "results": found}, indent=2) + "\n"
    )
    lines = [
        "# Training on a CPU: ours against a plain transformers loop",
        "",
        f"`python benchmarks/train_cpu.py --width {args.width} --pairs {args.pairs}` at commit {commit}.",
        f"{machine}, {facts['threads']} threads, torch {facts['torch']}, Python {facts['python']}.",
        f"Qwen3, width {args.width}, {args.layers} layers, vocabulary {args.vocab}; "
        f"{args.rows} rows of {args.seq_len} tokens.",
        "Ratio = plain seconds / our seconds, median over pairs that alternate in one process.",
        "",
        "| mode | ours tok/s | plain tok/s | median ratio |",
        "|---|---|---|---|",
        *(f"| {name} | {ours:,.0f} | {plain:,.0f} | {ratio:.2f} |" for name, ours, plain, ratio in rows),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
