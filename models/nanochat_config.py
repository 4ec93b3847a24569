"""The sizes and constants of nanochat, and what they were in each of its eras.

Its code wrote these constants into neither its config nor its checkpoints, so each era is a set of them. Dates are the
first day on which its main branch computed so; `2025-10-13`, the first release, is the family nanochat_v1.

from         different from the one before
2026-01-11   residual lambdas; windows of half the context, where the pattern has any
2026-01-18   value embeddings, gated by 32 channels, at most 2
2026-03-02   logits capped at 20
2026-03-09   rotation's base 100,000; q and k times 1.15; gates of 12 channels, at most 3; windows of a third of the
             context, rounded up to 128 tokens; logits capped at 15 again
2026-03-14   smear, backout, q and k times 1.2, windows of a quarter: until July 2026 at least (commit 92d63d4)

On 2026-01-27 alone it also had embeddings of token pairs, which nothing here computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanovl.models.blocks.attention import AttentionConfig, raise_if
from nanovl.models.blocks.mlp import MlpConfig
from nanovl.models.blocks.mtp import MtpConfig
from nanovl.models.blocks.rope import RopeConfig
from nanovl.models.decoder import BlockConfig
from nanovl.spec import FREE, GROWN

EPS = 1.1920929e-07
"""float32's own epsilon, which torch's norms add where none is given, as in nanochat."""


@dataclass(kw_only=True)
class NanochatConfig:
    vocab_size: int = 32768
    """Entries of the vocabulary; tables are padded to `vocab_multiple`."""
    vocab_multiple: int = 64
    """Rows of every vocabulary table come in this multiple."""
    depth: int = 20
    """Layers; the one dial."""
    aspect_ratio: int = 64
    """Channels a layer of depth, before rounding up to whole heads."""
    head_dim: int = 128
    """Channels a head."""
    num_key_value_heads: int = 0
    """Key and value heads; 0 = as many as query heads."""
    max_position_embeddings: int = 2048
    """Context, tokens; the short window derives from it."""
    window_pattern: str = "SSSL"
    """Short and long layers, tiled; the last layer is always long."""
    short_window_divisor: int = 4
    """Short window = context / this, rounded up to `short_window_multiple`, plus the token itself."""
    short_window_multiple: int = 128
    """Tokens the short window is rounded up to."""
    rope_theta: float = 100_000.0
    """Base of the rotation."""
    norm_eps: float = EPS
    """Epsilon of every norm."""
    qk_scale: float = 1.2
    """Factor on normed queries and keys."""
    mlp_ratio: int = 4
    """MLP width / model width."""
    softcap: float = 15.0
    """Logits become cap * tanh(logits / cap)."""
    smear: bool = True
    """Mix the previous token's embedding in."""
    smear_channels: int = 24
    """Channels its gate reads."""
    value_embeddings: bool = True
    """Token tables added to the values of alternating layers."""
    value_gate_channels: int = 12
    """Channels their gate reads."""
    value_gate_scale: float = 3.0
    """Largest gate."""
    residual_lambdas: bool = True
    """Learned weights of the stream and of the embedding before each block."""
    backout: bool = True
    """Subtract the middle of the stream at the end."""
    backout_init: float = field(default=0.2, metadata=FREE)
    """Its initial weight."""
    embedding_std: float = field(default=0.8, metadata=FREE)
    """Initial standard deviation of the embedding."""
    head_std: float = field(default=0.001, metadata=FREE)
    """Initial standard deviation of the head."""
    mlp_init_scale: float = field(default=0.4, metadata=FREE)
    """Initial up_proj relative to the attention matrices."""
    gate_init: float = field(default=0.02, metadata=FREE)
    """Initial gates are uniform from 0 to this."""
    stream_init: float = field(default=1.15, metadata=FREE)
    """Initial weight of the stream before the first block; between first and last block it changes evenly."""
    stream_init_last: float = field(default=1.05, metadata=FREE)
    """The same before the last block."""
    x0_init: float = field(default=0.20, metadata=FREE)
    """Initial weight of the embedding before the first block."""
    x0_init_last: float = field(default=0.05, metadata=FREE)
    """The same before the last block."""
    mtp: MtpConfig | None = field(default=None, metadata=GROWN)
    """Multi-token prediction, which nanochat's own code does not have."""

    @property
    def num_hidden_layers(self) -> int:
        return self.depth

    @property
    def hidden_size(self) -> int:
        return -(-self.depth * self.aspect_ratio // self.head_dim) * self.head_dim

    @property
    def num_attention_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def short_window(self) -> int:
        """Keys a short layer sees, itself included (FlashAttention's (W, 0) shows W + 1)."""
        span = -(-self.max_position_embeddings // self.short_window_divisor)
        return -(-span // self.short_window_multiple) * self.short_window_multiple + 1

    def window(self, layer: int) -> int | None:
        """Keys that `layer` sees; None = all."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer != self.depth - 1
        return self.short_window if short else None

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer counted back from the last."""
        return self.value_embeddings and layer % 2 == (self.depth - 1) % 2

    @property
    def blocks(self) -> dict[str, BlockConfig]:
        """Short and long layers, as templates: what is left out of them stands in the fields above."""
        return {
            self.layer_name(i): BlockConfig(mixer=self.attention(i), ffn=self.ffn) for i in range(self.depth)
        }

    def layer_name(self, layer: int) -> str:
        """long, short, long_ve, short_ve: its window, and whether it has value embeddings."""
        reach = "long" if self.window(layer) is None else "short"
        return f"{reach}_ve" if self.has_value_embedding(layer) else reach

    def layer_names(self) -> list[str]:
        """The template of each layer."""
        return [self.layer_name(layer) for layer in range(self.depth)]

    def mtp_block(self) -> str:
        """The template of layers that predict ahead, where there are any."""
        return (self.mtp.block if self.mtp else None) or self.layer_name(self.depth - 1)

    @property
    def ffn(self) -> MlpConfig:
        return MlpConfig(intermediate_size=self.mlp_ratio * self.hidden_size, activation="relu2", gated=False)

    def attention(self, layer: int) -> AttentionConfig:
        return AttentionConfig(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim,
            rope=RopeConfig(theta=self.rope_theta),
            sliding_window=self.window(layer),
            qk_norm="head",
            qk_norm_after_rope=True,
            qk_norm_weight=False,
        )

    def validate(self) -> None:
        """Raises ConfigError with everything that does not fit together."""
        positive = (
            "vocab_size",
            "vocab_multiple",
            "depth",
            "aspect_ratio",
            "head_dim",
            "max_position_embeddings",
            "short_window_divisor",
            "short_window_multiple",
            "mlp_ratio",
        )
        wrong = [
            f"{key} = {getattr(self, key)}: wants a number above 0"
            for key in positive
            if getattr(self, key) <= 0
        ]
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            wrong.append(f"window_pattern = {self.window_pattern!r}: wants letters S (short) and L (long)")
        if not wrong:
            gates = {"smear_channels": self.smear, "value_gate_channels": self.value_embeddings}
            for key in (key for key, used in gates.items() if used):
                if not 0 < getattr(self, key) <= self.hidden_size:
                    wrong.append(f"{key} = {getattr(self, key)}: wants 1 to hidden_size = {self.hidden_size}")
            wrong += self.attention(0).mistakes()
            wrong += [f"mtp.{m}" for m in self.mtp.mistakes(self.blocks)] if self.mtp else []
        raise_if(wrong)


_JANUARY = {
    "rope_theta": 10_000.0,
    "qk_scale": 1.0,
    "short_window_divisor": 2,
    "short_window_multiple": 1,
    "smear": False,
    "backout": False,
    "embedding_std": 1.0,
    "mlp_init_scale": 1.0,
    "stream_init": 1.0,
    "stream_init_last": 1.0,
}
_LAMBDAS = {**_JANUARY, "value_embeddings": False, "x0_init": 0.0, "x0_init_last": 0.0}
_GATES_OF_32 = {
    **_JANUARY,
    "value_gate_channels": 32,
    "value_gate_scale": 2.0,
    "gate_init": 0.0,
    "x0_init": 0.1,
    "x0_init_last": 0.1,
}
_GATES_OF_12 = {
    "qk_scale": 1.15,
    "short_window_divisor": 3,
    "smear": False,
    "backout": False,
    "mlp_init_scale": 0.5,
    "stream_init": 1.0,
    "stream_init_last": 1.0,
    "x0_init": 0.1,
    "x0_init_last": 0.1,
}
ERAS: dict[str, dict[str, Any]] = {
    "2026-01-11": _LAMBDAS,
    "2026-01-18": _GATES_OF_32,
    "2026-03-02": {**_GATES_OF_32, "softcap": 20.0},
    "2026-03-09": _GATES_OF_12,
    "2026-03-14": {},
}
"""First day -> the fields of NanochatConfig that are not its defaults."""
