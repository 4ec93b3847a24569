"""docs/parity.md: every mesh of tests/ranks/matrix.py against one rank, as measured here.

python tools/write_parity.py [--only TEXT]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nanovl.device import hardware
from nanovl.dist import RankFailed
from nanovl.log import out

ROOT = Path(__file__).parents[1]
HEAD = """# Every mesh against one rank

{count} of the {all} meshes of tests/ranks/matrix.py, written by `python tools/write_parity.py{flag}` at
commit {commit}, torch {torch}, {hardware}.

{steps} steps of small models in float32 on gloo ranks: packed rows of unequal documents, targets without loss, unequal
loss weights, 4 or 8 micro-batches, gradients clipped, no warm-up. Initial weights are equal bit for bit, or the row
fails. Loss: largest relative difference of a step. Gradients (of the first step) and weights (after the last): largest
norm of a parameter's difference over the norm of the parameter, or the relative difference of the global norm before
clipping; the gradient of a single number, whose terms may cancel, counts as at least a thousandth of all gradients'
norm. Limits: {loss:g}, {gradient:g}, {weight:g}. nanochat
and "qwen3 muon" train their matrices with Muon (plain decay: the cautious one asks for the sign of each update, so
where that is nearly zero its last bit switches a whole decay), the others everything with AdamW.

| model | mesh | ranks | loss | gradients | weights | |
|---|---|---|---|---|---|---|
"""


def row(case: Any, steps: int) -> tuple[str, bool]:
    from meshes import GRADIENT, LOSS, WEIGHT, difference

    cells = [case.model, case.mesh, str(case.world)]
    try:
        far = difference(case.job(), case.model, case.world, steps)
    except (RankFailed, AssertionError) as error:
        out(f"{case}: {error}")
        return "| " + " | ".join([*cells, "", "", "", f"failed: {str(error).splitlines()[-1]}"]) + " |", False
    gradient = max(far.norm, far.gradient)  # clipping hides a wrong scale, which the norm shows
    ok = far.loss < LOSS and gradient < GRADIENT and far.weight < WEIGHT
    cells += [f"{value:.1e}" for value in (far.loss, gradient, far.weight)]
    return "| " + " | ".join([*cells, "same" if ok else "NOT the same"]) + " |", ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this text; nothing is written")
    parser.add_argument("--covering", action="store_true", help="the meshes of the default test run only")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "ranks"))
    from matrix import COVERING, MATRIX
    from meshes import GRADIENT, LOSS, WEIGHT

    rows, failed = [], 0
    for case in MATRIX:
        if args.only not in str(case) or (args.covering and (case.model, case.mesh) not in COVERING):
            continue
        began = time.perf_counter()
        line, ok = row(case, args.steps)
        failed += not ok
        rows.append(line)
        out(f"{line}  {time.perf_counter() - began:.0f} s")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    head = HEAD.format(
        count=len(rows),
        all=len(MATRIX),
        flag=" --covering" if args.covering else "",
        commit=commit.stdout.strip(),
        torch=torch.__version__,
        hardware=hardware(torch.device("cpu")),
        steps=args.steps,
        loss=LOSS,
        gradient=GRADIENT,
        weight=WEIGHT,
    )
    if not args.only:
        (ROOT / "docs" / "parity.md").write_text(head + "\n".join(rows) + "\n")
    out(f"{len(rows)} meshes, {failed} not as one rank")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
