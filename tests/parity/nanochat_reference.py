"""nanochat in each of its eras, written from what its code computes, of plain torch and slowly; and its files.

Names of parameters are nanochat's. A row is one document.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

from nanovl.checkpoint.locate import find_source
from nanovl.spec import ModelSpec
from nanovl.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN


@dataclass(frozen=True)
class Era:
    base: float = 1e4
    cap: float = 15.0
    lambdas: bool = False
    gate: tuple[int, float] | None = None
    """Channels that gates of value embeddings read, and the factor on their sigmoid."""
    sharpness: float = 1.0
    short: Callable[[int], int] | None = None
    """Context -> earlier tokens that a short layer sees."""
    smear: bool = False


def half(context: int) -> int:
    return context // 2


def up_to_128(parts: int) -> Callable[[int], int]:
    return lambda context: -(-context // (parts * 128)) * 128


ERAS = {
    "2025-10-13": Era(),
    "2026-01-11": Era(lambdas=True, short=half),
    "2026-01-18": Era(lambdas=True, short=half, gate=(32, 2.0)),
    "2026-03-02": Era(lambdas=True, short=half, gate=(32, 2.0), cap=20.0),
    "2026-03-09": Era(lambdas=True, short=up_to_128(3), gate=(12, 3.0), base=1e5, sharpness=1.15),
    "2026-03-14": Era(lambdas=True, short=up_to_128(4), gate=(12, 3.0), base=1e5, sharpness=1.2, smear=True),
}


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


class Reference(nn.Module):
    """`config` is the model_config of a meta file."""

    def __init__(self, era: Era, config: dict[str, Any], padded_vocab: int) -> None:
        super().__init__()
        self.era, self.config = era, config
        depth, width, heads = config["n_layer"], config["n_embd"], config["n_head"]
        self.dim = width // heads
        kv = self.dim * config["n_kv_head"]

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        def block(i: int) -> nn.ModuleDict:
            attn = {"c_q": linear(width, width), "c_k": linear(width, kv), "c_v": linear(width, kv)}
            attn["c_proj"] = linear(width, width)
            if self.has_table(i):
                attn["ve_gate"] = linear(era.gate[0], config["n_kv_head"])  # type: ignore[index]
            mlp = {"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)}
            return nn.ModuleDict({"attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp)})

        blocks = nn.ModuleList([block(i) for i in range(depth)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(padded_vocab, width), "h": blocks})
        self.lm_head = linear(width, padded_vocab)
        if era.lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(depth))
            self.x0_lambdas = nn.Parameter(torch.empty(depth))
        if era.gate:
            tables = {str(i): nn.Embedding(padded_vocab, kv) for i in range(depth) if self.has_table(i)}
            self.value_embeds = nn.ModuleDict(tables)
        if era.smear:
            self.smear_gate = linear(24, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))

    def has_table(self, i: int) -> bool:
        return self.era.gate is not None and (self.config["n_layer"] - 1 - i) % 2 == 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        era, depth = self.era, self.config["n_layer"]
        x = norm(self.transformer["wte"](tokens))
        if era.smear:
            gate = self.smear_lambda * self.smear_gate(x[:, 1:, :24]).sigmoid()
            x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        x0 = x
        for i, block in enumerate(self.transformer["h"]):
            if era.lambdas:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = x + self.attend(i, block["attn"], norm(x), tokens)
            x = x + block["mlp"]["c_proj"](F.relu(block["mlp"]["c_fc"](norm(x))) ** 2)
            if i == depth // 2:
                middle = x
        if era.smear:
            x = x - self.backout_lambda * middle
        logits = self.lm_head(norm(x))[..., : self.config["vocab_size"]]
        return era.cap * torch.tanh(logits / era.cap)

    def attend(self, i: int, attn: nn.ModuleDict, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = (attn[f"c_{name}"](x).view(rows, length, -1, self.dim) for name in "qkv")
        if self.has_table(i):
            channels, scale = self.era.gate  # type: ignore[misc]
            gate = scale * attn["ve_gate"](x[..., :channels]).sigmoid()
            v = v + gate[..., None] * self.value_embeds[str(i)](tokens).view(v.shape)
        q, k = (self.era.sharpness * norm(self.turned_back(z)) for z in (q, k))
        k, v = (z.repeat_interleave(self.config["n_head"] // z.shape[2], dim=2) for z in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / self.dim**0.5
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = distance < 0
        pattern = self.config.get("window_pattern", "L")
        if pattern[i % len(pattern)] == "S" and i < self.config["n_layer"] - 1:
            hidden = hidden | (distance > self.era.short(self.config["sequence_len"]))  # type: ignore[misc]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return attn["c_proj"](torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))

    def turned_back(self, z: torch.Tensor) -> torch.Tensor:
        """Channels a and b of a pair: (a cos + b sin, b cos - a sin)."""
        a, b = z.chunk(2, dim=-1)
        frequency = 1.0 / self.era.base ** (torch.arange(0, self.dim, 2) / self.dim)
        angle = (torch.arange(z.shape[1])[:, None] * frequency)[:, None]
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), dim=-1)


def reference(day: str, *, vocab: int = 131, padding: bool = True, seed: int = 0, **sizes: Any) -> Reference:
    """A random model of that day's era, small, with tables of bfloat16 numbers as nanochat has them on a GPU."""
    config = {
        "sequence_len": 400,
        "vocab_size": vocab,
        "n_layer": 5,
        "n_head": 2,
        "n_kv_head": 2,
        "n_embd": 64,
    }
    config |= {"window_pattern": "SSL"} if ERAS[day].lambdas else {}
    model = Reference(ERAS[day], {**config, **sizes}, -(-vocab // 64) * 64 if padding else vocab)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = float(name in ("resid_lambdas", "smear_lambda"))
            std = 0.3 if parameter.dim() == 1 or name == "lm_head.weight" else 0.15
            parameter.normal_(mean, std, generator=generator)
            if "wte" in name or "value_embeds" in name:
                parameter.copy_(parameter.bfloat16())
    return model


def write(folder: Path, model: Reference, *, step: int = 12, prefix: str = "", **more: Any) -> Path:
    """The files of `model`, as nanochat saves them on a GPU; `more` goes into the meta file."""
    state = {
        prefix + name: value.bfloat16() if "wte" in name or "value_embeds" in name else value
        for name, value in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 0.8, "model_config": model.config, "user_config": {"depth": 5}, **more}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2))
    return folder


def write_tokenizer(folder: Path) -> tiktoken.Encoding:
    """tokenizer.pkl as nanochat saves it: 256 bytes, two tokens more, nine special ones."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    specials = {name: 258 + i for i, name in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding(
        "rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return encoding


def imported(path: Path) -> tuple[nn.Module, ModelSpec]:
    """Ours, from the files at `path`."""
    source = find_source(path)
    model = source.spec.family.model(source.spec.config)
    source.fill(model)
    return model, source.spec


def random_tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 131, (2, length), generator=torch.Generator().manual_seed(seed))
