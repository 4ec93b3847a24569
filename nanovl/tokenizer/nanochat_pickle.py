"""nanochat's tokenizer folder: tokenizer.pkl, a pickled tiktoken.Encoding, and token_bytes.pt.

A pickle can run any code when it is read. Here one name is admitted in it, `tiktoken.core.Encoding`, and even that
stands for a class that only keeps what it is given: patterns, tokens and numbers. token_bytes.pt is written, and never
read, since what it says follows from the tokens (and is wrong for bytes above 0x7f before July 2026).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from nanovl.errors import ConfigError
from nanovl.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanovl.tokenizer.files import PICKLE_FILE
from nanovl.tokenizer.train import merges_of

INSTEAD = "save it with transformers as a tokenizer.json beside the file, which is read first"


class _Encoding:
    """What a tiktoken.Encoding would be made of."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Encoding


def read_pickled(file: Path) -> Tokenizer:
    """The tokenizer in `file`, no code of which runs. Raises ConfigError where it is none that nanochat trains."""
    try:
        with file.open("rb") as handle:
            found = _Reader(handle).load()
    except Exception as error:  # a broken pickle can fail in any way
        raise ConfigError(
            f"{file}: not a pickled tiktoken.Encoding alone, so it is not read ({error}); {INSTEAD}"
        ) from None
    state = found.state if isinstance(found, _Encoding) else None
    if isinstance(state, str):
        raise ConfigError(f"{file}: names tiktoken's encoding {state!r} and holds no tokens of it; {INSTEAD}")
    ranks = state.get("mergeable_ranks") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(ranks, dict):
        raise ConfigError(f"{file}: holds no tokens; copy it again")
    wrong = _strange(ranks, state.get("pat_str"), state.get("special_tokens"))
    if wrong:
        raise ConfigError(f"{file}: {', '.join(wrong)}, unlike any that nanochat trains; {INSTEAD}")
    try:
        return Tokenizer(merges_of(sorted(ranks, key=ranks.__getitem__)))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; copy it again") from None


def _strange(ranks: dict[Any, Any], pattern: Any, specials: Any) -> list[str]:
    """What is not as in nanochat's tokenizers, of which ours are the same."""
    wrong = []
    if pattern != SPLIT_PATTERN:
        wrong.append(f"splits text by {pattern!r}")
    if specials != {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}:
        wrong.append(f"has the special tokens {specials!r}")
    of_number = {number: token for token, number in ranks.items()}
    if of_number.keys() != set(range(len(ranks))):
        wrong.append("has numbers with no token")
    elif [of_number[byte] for byte in range(256) if byte in of_number] != [bytes([b]) for b in range(256)]:
        wrong.append("does not begin with the 256 bytes")
    elif not all(isinstance(token, bytes) and token for token in ranks):
        wrong.append("has tokens that are no bytes")
    return wrong


def write_pickled(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.pkl and token_bytes.pt into `folder`, as nanochat loads them."""
    import tiktoken
    import torch

    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_ids,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PICKLE_FILE).write_bytes(pickle.dumps(encoding))
    torch.save(torch.from_numpy(tokenizer.token_bytes()), folder / "token_bytes.pt")
