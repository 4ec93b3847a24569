"""A decoder-only transformer composed from typed blocks: every family but current nanochat is a DecoderConfig.

Layers are named templates laid out by prefix + tiled pattern + suffix, so one key changes all layers of a kind:
`--model.blocks.full.mixer.sliding_window=1024`. There is no branch on a family's name anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from nanovl.models.blocks.attention import Attention, AttentionConfig, AttentionMeta, raise_if
from nanovl.models.blocks.head import Head
from nanovl.models.blocks.mlp import Mlp, MlpConfig
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.spec import Model

# B batch, T tokens, D model, V vocabulary


@dataclass(kw_only=True)
class BlockConfig:
    mixer: AttentionConfig
    """Mixes tokens."""
    ffn: MlpConfig
    """Mixes channels."""


@dataclass(kw_only=True)
class DecoderConfig:
    vocab_size: int
    """Entries of the embedding and of the head."""
    hidden_size: int
    """Channels of the residual stream."""
    num_hidden_layers: int
    """Blocks."""
    blocks: dict[str, BlockConfig]
    """Block templates by name."""
    pattern: list[str]
    """Template names, tiled over the layers between prefix and suffix."""
    prefix: list[str] = field(default_factory=list)
    """Templates of the first layers."""
    suffix: list[str] = field(default_factory=list)
    """Templates of the last layers."""
    norm: NormConfig = field(default_factory=NormConfig)
    """Every norm of the model."""
    tie_word_embeddings: bool = False
    """The head's weight is the embedding's."""
    embed_norm: bool = False
    """Norm right after the embedding."""
    final_logit_softcapping: float | None = None
    """Logits become cap * tanh(logits / cap)."""
    max_position_embeddings: int = 4096
    """Context the checkpoint is meant for, tokens."""
    initializer_range: float = 0.02
    """Standard deviation of every initial matrix and embedding."""
    zero_init_outputs: bool = False
    """Start every o_proj and down_proj at 0, so that each block starts as the identity."""

    def layers(self) -> list[BlockConfig]:
        """One template a layer: prefix, then the pattern tiled, then suffix."""
        tiled = self.num_hidden_layers - len(self.prefix) - len(self.suffix)
        names = [*self.prefix, *(self.pattern[i % len(self.pattern)] for i in range(tiled)), *self.suffix]
        return [self.blocks[name] for name in names]

    def validate(self) -> None:
        """Raises ConfigError with everything that does not fit together."""
        wrong = []
        for key, value in (("vocab_size", self.vocab_size), ("hidden_size", self.hidden_size)):
            if value <= 0:
                wrong.append(f"{key} = {value}: wants a number above 0")
        if self.num_hidden_layers < max(1, len(self.prefix) + len(self.suffix)):
            wrong.append(
                f"num_hidden_layers = {self.num_hidden_layers}: wants 1 or more, and room for prefix and suffix"
            )
        for key, names in (("pattern", self.pattern), ("prefix", self.prefix), ("suffix", self.suffix)):
            wrong += [
                f"{key}: {n!r} is no block; choose from {', '.join(self.blocks)}"
                for n in names
                if n not in self.blocks
            ]
        if not self.pattern:
            wrong.append(f"pattern: empty; name at least one of {', '.join(self.blocks)}")
        for name, block in self.blocks.items():
            wrong += [f"blocks.{name}.mixer.{m}" for m in block.mixer.mistakes()]
        raise_if(wrong)


class Block(nn.Module):
    """x + mixer(norm x), then x + ffn(norm x)."""

    def __init__(self, config: BlockConfig, hidden_size: int, norm: NormConfig) -> None:
        super().__init__()
        self.mixer_pre_norm = RMSNorm(hidden_size, norm)
        self.mixer = Attention(config.mixer, hidden_size, norm)
        self.ffn_pre_norm = RMSNorm(hidden_size, norm)
        self.ffn = Mlp(config.ffn, hidden_size)

    def forward(self, x_BTD: Tensor, meta: AttentionMeta) -> Tensor:
        x_BTD = x_BTD + self.mixer(self.mixer_pre_norm(x_BTD), meta)
        return x_BTD + self.ffn(self.ffn_pre_norm(x_BTD))


class Decoder(Model):
    """Tokens -> logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = RMSNorm(config.hidden_size, config.norm) if config.embed_norm else nn.Identity()
        # a dict keeps global layer numbers in the names when a pipeline stage holds only some layers
        self.layers = nn.ModuleDict(
            {str(i): Block(block, config.hidden_size, config.norm) for i, block in enumerate(config.layers())}
        )
        self.norm = RMSNorm(config.hidden_size, config.norm)
        self.lm_head = Head(config.hidden_size, config.vocab_size, softcap=config.final_logit_softcapping)
        if config.tie_word_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.embed_tokens.weight)

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        meta = attention_meta(self, positions_BT, doc_ids_BT)
        x_BTD = self.embed_norm(self.embed_tokens(tokens_BT))
        for layer in self.layers.values():
            x_BTD = layer(x_BTD, meta)
        return self.norm(x_BTD)

    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        if name.endswith("bias") or (
            self.config.zero_init_outputs and name.endswith(("o_proj.weight", "down_proj.weight"))
        ):
            full.zero_()
        elif "norm" in name:
            full.fill_(1.0)
        else:
            full.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward_flops_per_token(self, mean_keys: Callable[[int | None], float]) -> float:
        return flops_per_token(self, mean_keys)


def attention_meta(model: nn.Module, positions_BT: Tensor, doc_ids_BT: Tensor | None) -> AttentionMeta:
    """The masks and rotation tables that the attention layers of `model` ask for."""
    mixers = [m for m in model.modules() if isinstance(m, Attention)]
    ropes = [m.rope_key for m in mixers if m.rope_key is not None]
    return AttentionMeta.build(positions_BT, doc_ids_BT, [m.config.sliding_window for m in mixers], ropes)


def flops_per_token(model: nn.Module, mean_keys: Callable[[int | None], float]) -> float:
    """Forward FLOPs of one token: every weight that multiplies it, and its attention."""
    attention = (attention_flops(m.config, mean_keys) for m in model.modules() if isinstance(m, Attention))
    return matmul_flops_per_token(model) + sum(attention)


def matmul_flops_per_token(model: nn.Module) -> float:
    """2 FLOPs for every weight that multiplies a token: linears and head (tied or not), no embedding look-up."""
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    heads = sum(m.vocab_size * m.weight.shape[1] for m in model.modules() if isinstance(m, Head))
    return 2.0 * (linears + heads)


def attention_flops(config: AttentionConfig, mean_keys: Callable[[int | None], float]) -> float:
    """2 H (d_qk + d_v) keys: scores and their weighted sum of values."""
    return 2.0 * config.num_attention_heads * 2 * config.head_dim * mean_keys(config.sliding_window)
