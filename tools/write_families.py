"""The table of architectures in README.md: what each is, and how far it is from transformers, as measured here.

python tools/write_families.py [--only NAME]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovl.anatomy import meta_model
from nanovl.log import out
from nanovl.models_tools import short
from nanovl.registry import MODELS, family
from nanovl.spec import ModelFamily, ModelSpec

ROOT = Path(__file__).parents[1]
FIRST = "<!-- written by tools/write_families.py -->"
LAST = "<!-- end of the table -->"
HEAD = """
| family | what it is | sizes | transformers class | logits | greedy | checkpoints |
|---|---|---|---|---|---|---|
"""
FOOT = """
`nanovl models show qwen3_moe:30b-a3b` takes one apart. Logits: largest difference from the transformers class in
float32, over {cases} random small models of all kinds that `tests/parity` names. Greedy: 20 tokens through the engine's
cache equal those of `generate`, for each of them. Checkpoints: what is read and written again is equal bit for bit.
Families without a class are held against independent implementations in the tests.
Measured at commit {commit} with transformers {transformers}, torch {torch} on a CPU.
"""


@dataclass(frozen=True)
class Measured:
    """Of all tiny configs of a family."""

    logits: float
    greedy: bool
    checkpoints: bool
    cases: int


def said(one: ModelFamily) -> list[str]:
    """Cells that need no measurement: name, what it is, sizes, class."""
    counts = {
        flavor: sum(p.numel() for p in meta_model(ModelSpec(one, make(), flavor)).parameters())
        for flavor, make in one.flavors.items()
        if flavor != "debug"
    }
    sizes = [
        f"{flavor} ({short(count)})" for flavor, count in sorted(counts.items(), key=lambda item: item[1])
    ]
    shown = f"{sizes[0]} to {sizes[-1]}, {len(sizes)} in all" if len(sizes) > 6 else ", ".join(sizes)
    named = f"`{one.hf.architecture}`" if one.hf is not None and one.hf.config_to_hf else ""
    return [f"`{one.name}`", one.summary, shown, named]


def checkpoints(one: ModelFamily) -> str:
    """Which files go in and out."""
    ways = [] if one.hf is None else ["in, out" if one.hf.config_to_hf else "in"]
    if one.nanochat is not None:
        ways.append("`.pt` in" if one.nanochat.config_to_meta is None else "`.pt` in, out")
    return "; ".join(ways) or ""


def measured(of: Any) -> Measured:
    """`of` = an entry of tests/parity/every_family.py."""
    from hf_pairs import (
        assert_checkpoint_returns,
        assert_same_greedy_tokens,
        pair,
        random_tokens,
    )

    def holds(check: Any, *args: Any) -> bool:
        try:
            check(*args)
        except AssertionError as error:
            out(f"{of.name} {args}: {str(error).splitlines()[:1]}")
            return False
        return True

    far, greedy, returns = 0.0, True, True
    for case in of.cases:
        both = pair(of, case)
        with torch.no_grad():
            for seed in range(3):
                tokens = random_tokens(seed, 70)
                far = max(far, (both.theirs(tokens).logits - both.ours(tokens)).abs().max().item())
        greedy = holds(assert_same_greedy_tokens, both, 0) and greedy
        with tempfile.TemporaryDirectory() as folder:
            returns = holds(assert_checkpoint_returns, both, Path(folder), 0) and returns
    return Measured(far, greedy, returns, len(of.cases))


def row(one: ModelFamily, of: Measured | None) -> str:
    """One line of the table; None = there is nothing to measure it against."""
    found = (
        ["", ""]
        if of is None
        else [f"{of.logits:.1e}" if of.logits else "0", "equal" if of.greedy else "NOT equal"]
    )
    files = checkpoints(one) if of is None or of.checkpoints else "NOT equal"
    return "| " + " | ".join([*said(one), *found, files]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families whose name holds this text; nothing is written")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    import transformers
    from every_family import every_family

    pairs, rows, failed, count = every_family(), [], 0, 0
    for name in (name for name in MODELS if args.only in name):
        of = measured(pairs[name]) if name in pairs else None
        if of is not None:
            failed += not (of.greedy and of.checkpoints)
            count += of.cases
        rows.append(row(family(name), of))
        out(rows[-1])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    foot = FOOT.format(
        cases=count,
        commit=commit.stdout.strip(),
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
    )
    if not args.only:
        readme = ROOT / "README.md"
        text = "\n".join([FIRST, HEAD + "\n".join(rows) + "\n" + foot + LAST])
        old = re.compile(re.escape(FIRST) + ".*" + re.escape(LAST), re.DOTALL)
        assert old.search(readme.read_text()), f"README.md has no {FIRST}"
        readme.write_text(old.sub(lambda _: text, readme.read_text()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
