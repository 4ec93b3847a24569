"""What each parallelism costs on two gloo ranks of this machine, against one rank with the same total work.

    python benchmarks/parallel_cpu.py [--width 256] [--rounds 5] [--out benchmarks]

Every rank has one thread. A round times one rank and then every mesh, and the ratios are taken within a round: the
machine's mood cancels out. seconds = a mesh's seconds a step over one rank's (0.5 would be perfect on two free cores);
core-seconds = twice that: 1 would be free.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from nanovl.build import build_model, build_optimizers
from nanovl.config.schema import Job, Model, Optimizer, OptimizerGroup, Parallelism, Tokenizer, Training
from nanovl.device import Modes, hardware
from nanovl.dist import barrier, fork_ranks
from nanovl.log import Log, table
from nanovl.mesh import build_mesh
from nanovl.optim.scaling import SizeRules
from nanovl.registry import resolve_model
from nanovl.step import train_step
from nanovl.verify import made_up_rows

CPU = torch.device("cpu")
VOCAB = 4096
MESHES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("dense", {}),
    "ddp": ("dense", {"data_parallel_replicate_degree": 2}),
    "tensor": ("dense", {"tensor_parallel_degree": 2}),
    "context, allgather": ("dense", {"context_parallel_degree": 2}),
    "context, ring": ("dense", {"context_parallel_degree": 2, "context_parallel_method": "ring"}),
    "context, ulysses": ("dense", {"context_parallel_degree": 2, "context_parallel_method": "ulysses"}),
    "pipeline, 1F1B": ("dense", {"pipeline_parallel_degree": 2}),
    "pipeline, ZBVZeroBubble": (
        "dense",
        {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
    ),
    "expert": ("moe", {"expert_parallel_degree": 2}),
}


def job_of(args: argparse.Namespace, kind: str, fields: dict[str, Any]) -> Job:
    mixer = {
        "num_attention_heads": args.width // 32,
        "num_key_value_heads": args.width // 64,
        "head_dim": 32,
    }
    ffn = {"intermediate_size": 3 * args.width} if kind == "dense" else {"moe_intermediate_size": args.width}
    return Job(
        model=Model(
            name="qwen3" if kind == "dense" else "qwen3_moe",
            flavor="debug",
            overrides={
                "hidden_size": args.width,
                "num_hidden_layers": 4,
                "blocks": {"full": {"mixer": mixer, "ffn": ffn}},
            },
        ),
        tokenizer=Tokenizer(vocab_size=VOCAB),
        training=Training(
            seq_len=args.seq_len,
            global_batch_size=args.rows,
            local_batch_size=1,
            mixed_precision_param="float32",
            steps=10,
        ),
        optimizer=Optimizer(groups=[OptimizerGroup(match=".*")]),
        parallelism=Parallelism(**fields),
    )


def seconds_on_rank(rank: int, job: Job, world: int, steps: int) -> float:
    """Seconds a step, as the slowest rank sees it."""
    mesh = build_mesh(job.parallelism, world, CPU)
    spec = resolve_model(job.model, VOCAB)
    modes, log = Modes(torch.float32, False), Log(1)
    model = build_model(job, spec, mesh, modes, CPU, log, fresh=True)
    optimizers = build_optimizers(job, spec, model, SizeRules(0, 0, 10, 1.0, 1.0, 1.0), modes, log)
    mine = range(mesh.data_rank, job.training.global_batch_size, mesh.data_degree)
    batches = [made_up_rows(job, VOCAB, 0, [row]) for row in mine]
    for step in range(steps + 1):
        if step == 1:
            barrier()
            began = time.perf_counter()
        train_step(model, batches, max_norm=1.0, chunk_tokens=256)
        optimizers.step()
        optimizers.zero_grad()
    barrier()
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="", help="folder for the .md and .json")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {name: [] for name in MESHES}
    alone: dict[str, list[float]] = {}
    for round_number in range(args.rounds):
        one: dict[str, float] = {}
        for kind in ("dense", "moe"):
            one[kind] = fork_ranks(seconds_on_rank, 1, job_of(args, kind, {}), 1, args.steps)[0]
            alone.setdefault(kind, []).append(one[kind])
        for name, (kind, fields) in MESHES.items():
            taken = max(fork_ranks(seconds_on_rank, 2, job_of(args, kind, fields), 2, args.steps))
            ratios[name].append(taken / one[kind])
        print(f"round {round_number + 1} of {args.rounds}", flush=True)
    tokens = args.rows * args.seq_len
    rows = [
        [
            name,
            tokens / (statistics.median(alone[MESHES[name][0]]) * statistics.median(r)),
            statistics.median(r),
            2 * statistics.median(r),
            f"{min(r):.2f} to {max(r):.2f}",
        ]
        for name, r in ratios.items()
    ]
    single = {kind: tokens / statistics.median(seconds) for kind, seconds in alone.items()}
    print(f"one rank: {', '.join(f'{kind} {speed:,.0f} tok/s' for kind, speed in single.items())}")
    header = ["two ranks", "tok/s", "seconds", "core-seconds", "seconds, range"]
    print(table(header, rows))
    if args.out:
        write(Path(args.out), args, header, rows, single, ratios)


def write(
    folder: Path,
    args: argparse.Namespace,
    header: list[str],
    rows: list[list[Any]],
    single: dict[str, float],
    ratios: dict[str, list[float]],
) -> None:
    machine = hardware(CPU)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    slug = "".join(c if c.isalnum() else "-" for c in machine.lower()).strip("-")
    stem = folder / f"parallel_cpu_{slug}_{time.strftime('%Y-%m-%d')}"
    facts = {
        "hardware": machine,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        **vars(args),
    }
    found = {**facts, "one rank tok/s": single, "ratios": ratios}
    stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    lines = [
        "# Two gloo ranks against one, the same total work",
        "",
        f"`python benchmarks/parallel_cpu.py --width {args.width} --rounds {args.rounds}` at commit {commit}.",
        f"{machine}, one thread a rank, torch {facts['torch']}, Python {facts['python']}.",
        f"Qwen3 of 4 layers, width {args.width}, vocabulary {VOCAB}; {args.rows} micro-batches of one row of "
        f"{args.seq_len} tokens; float32, eager, AdamW.",
        f"One rank: {', '.join(f'{kind} {speed:,.0f} tok/s' for kind, speed in single.items())}.",
        "seconds = two ranks' seconds a step over one rank's; 0.5 would be perfect. Medians over the rounds.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(c if isinstance(c, str) else f"{c:,.2f}" for c in row) + " |" for row in rows),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
