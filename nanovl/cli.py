"""The `nanovl` command: a table of subcommands, each imported only when it is asked for."""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module

from nanovl import __version__
from nanovl.errors import NanovlError
from nanovl.log import err, out

COMMANDS = {
    "train": ("nanovl.launch", "train a model: nanovl train --config configs/quickstart.toml"),
    "chat": ("nanovl.chat", "talk to a run in the terminal: nanovl chat runs/quickstart"),
    "generate": ("nanovl.generate", "continue prompts: nanovl generate runs/quickstart --prompt 'import os'"),
    "evaluate": ("nanovl.evaluate", "bits per byte of a run on held-out text"),
    "report": ("nanovl.report", "report.md and curves of a run"),
    "tokenizer": ("nanovl.tokenizer_tools", "train a tokenizer, or print its statistics"),
    "data": ("nanovl.data_tools", "show packed rows, download shards, tokenise ahead"),
    "config": ("nanovl.config_tools", "check or show a job, print its JSON Schema"),
    "models": ("nanovl.models_tools", "the architectures, and the size, layers, memory and FLOPs of one"),
    "plan": ("nanovl.plan", "memory, traffic, time and cost of a job on any number of GPUs, without them"),
    "verify": ("nanovl.verify_tools", "is a job on its mesh the same as on one rank? asked on this machine"),
    "convert": (
        "nanovl.convert_tools",
        "checkpoints from one format to another: Hugging Face, run, plain safetensors",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 1 failed, 2 wrong command line or config, 75 stopped and saved."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        out(usage())
        return 0
    if args[0] == "--version":
        out(f"nanovl {__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        err(
            f"nanovl: no such command: {name}; "
            + (f"did you mean {near[0]!r}?" if near else "see nanovl --help")
        )
        return 2
    # read by libgomp when torch loads it: idle threads must sleep, or two jobs on one machine starve each other
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code: int = import_module(COMMANDS[name][0]).main(args[1:])
        return code
    except NanovlError as error:
        err(f"nanovl {name}: {error}")
        return error.exit_code
    except BrokenPipeError:  # `nanovl ... | head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        err(f"nanovl {name}: interrupted")
        return 130


def usage() -> str:
    """What `nanovl --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: nanovl COMMAND [...]", "", *lines, "", "nanovl COMMAND --help says more."])
