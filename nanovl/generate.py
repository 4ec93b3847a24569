"""`nanovl generate`: continue prompts with a run, a checkpoint, a Hugging Face directory or nanochat's folder."""

from __future__ import annotations

import argparse
import json
import sys

from nanovl.errors import ConfigError
from nanovl.inference.request import Request, check_request
from nanovl.log import out


def main(argv: list[str]) -> int:
    """`nanovl generate PATH --prompt TEXT [...]`; without --prompt, the lines of stdin.

    Raises NanovlError, and SystemExit(2) on a wrong command line.
    """
    parser = argparse.ArgumentParser(
        prog="nanovl generate", description="Continue prompts with a trained model.", allow_abbrev=False
    )
    parser.add_argument("path", help="run folder, checkpoint, Hugging Face directory, or nanochat's folder")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be repeated (default: stdin's lines)",
    )
    add_sampling_arguments(parser, max_tokens=128, temperature=0.0, top_k=0)
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="samples of each prompt (default 1)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a sample, with ids and log-probabilities"
    )
    args = parser.parse_args(argv)
    check_sampling_arguments(args)
    _check_samples(args.num_samples, args.temperature)
    prompts = _lines_of_stdin() if args.prompt is None else args.prompt

    from nanovl.inference.engine import Engine
    from nanovl.inference.load import load

    engine = Engine(load(args.path, device=args.device, dtype=args.dtype))
    completions = engine.generate(
        [prompt for prompt in prompts for _ in range(args.num_samples)],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    for i, completion in enumerate(completions):
        prompt = prompts[i // args.num_samples]
        if args.json:
            out(json.dumps({"prompt": prompt, "sample": i % args.num_samples, **vars(completion)}))
        else:
            out(("\n" if i else "") + prompt + completion.text)
    return 0


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, top_k: int
) -> None:
    """What every command that samples takes, with the command's own defaults."""
    add = parser.add_argument
    add(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"new tokens at most (default {max_tokens})",
    )
    add(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"0 = always the likeliest token; 1 = as the model has it (default {temperature:g})",
    )
    add(
        "--top-k",
        type=int,
        default=top_k,
        metavar="K",
        help=f"draw from the K likeliest; 0 = all (default {top_k})",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest with probability P (default 1)",
    )
    add("--seed", type=int, default=0, metavar="S", help="source of all randomness (default 0)")
    add("--device", default="", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")


def check_sampling_arguments(args: argparse.Namespace) -> None:
    """Raises RequestError for settings that no request may have; before a model is loaded for nothing."""
    settings = {key: getattr(args, key) for key in ("max_tokens", "temperature", "top_k", "top_p", "seed")}
    check_request(Request(prompt_ids=[0], **settings), context_tokens=1, vocab_size=1)


def _check_samples(num_samples: int, temperature: float) -> None:
    if num_samples < 1:
        raise ConfigError(f"--num-samples = {num_samples}: wants 1 or more")
    if num_samples > 1 and temperature == 0:
        raise ConfigError(
            f"--num-samples = {num_samples} at temperature 0 is the same text each time: set --temperature"
        )


def _lines_of_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, or pipe lines in")
    lines = [line for line in sys.stdin.read().splitlines() if line]
    if not lines:
        raise ConfigError("no prompt: stdin holds no line; give --prompt TEXT, or pipe lines in")
    return lines
