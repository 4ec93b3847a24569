"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values come from one small latent a token.

    latent | key_r = kv_a x        one latent and one rotated key part for all heads
    k_h = [kv_b_h norm(latent) | rotated key_r],   v_h = kv_b'_h norm(latent)
    q_h = [q_b_h norm(q_a x) | its last channels rotated]

Only the last `qk_rope_head_dim` channels of a head turn. Keys and values are expanded to all heads before `core`. Where
few new tokens read many (the engine remembers the two small ones of all), kv_b is folded into queries and outputs
instead, and all heads read one key and one value, the latent itself:

    q_h . k_h = [kv_b_h^T q_h's still channels | rotated q_h] . [norm(latent) | rotated key_r]
    sum_s a_hs v_hs = kv_b'_h sum_s a_hs norm(latent_s)

With an indexer, `core` attends to the keys that it chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nanovl.models.blocks.attention import AttentionCore, AttentionMeta, Kernel, RopeKey, Scores
from nanovl.models.blocks.indexer import Indexer, IndexerConfig
from nanovl.models.blocks.kernels import varlen_mistakes
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.models.blocks.rope import RopeConfig, apply_rope, sharpening
from nanovl.models.blocks.sparse_core import SparseCore
from nanovl.spec import FREE, GROWN, Cut, TensorPlan

# B batch, T tokens, S key tokens, D model channels in x and head channels elsewhere, L latent channels, H heads


@dataclass(kw_only=True)
class MlaConfig:
    kind: Literal["mla"] = "mla"
    """Tells it from other mixers."""
    num_attention_heads: int
    """Heads of queries, keys and values."""
    q_lora_rank: int | None = None
    """Channels of the queries' latent; none = queries straight from the stream."""
    kv_lora_rank: int
    """Channels of the latent of keys and values."""
    qk_nope_head_dim: int
    """Channels of a query or key head that do not turn."""
    qk_rope_head_dim: int
    """Channels that do; those of keys are shared by all heads."""
    v_head_dim: int
    """Channels of a value head."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary embedding; YaRN's `mscale_all_dim` also sharpens the softmax."""
    latent_norm_eps: float = 1e-6
    """Added to the mean square of latents, whatever the other norms add."""
    bias: bool = False
    """Biases of the projections to the latents and of the output projection."""
    sliding_window: int | None = None
    """Keys a query sees, itself included; none = all."""
    kernel: Kernel = field(default="auto", metadata=FREE)
    """As of `attention`; no `flex` with an indexer."""
    indexer: IndexerConfig | None = field(default=None, metadata=GROWN)
    """Chooses the keys that a query attends to (DeepSeek-V3.2); none = all."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def training_keys(self) -> int | None:
        """Keys a query attends to in training at most; None = all."""
        limits = (self.sliding_window, None if self.indexer is None else self.indexer.training_keys)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def scores(self) -> Scores:
        """Scale (d_nope + d_rope)^-0.5 m^2, m = 0.1 mscale_all_dim ln(factor) + 1 under YaRN."""
        scaling = self.rope.scaling
        m = sharpening(scaling.factor, scaling.mscale_all_dim) if scaling and scaling.mscale_all_dim else 1.0
        return Scores(self.qk_head_dim**-0.5 * m * m, kernel=self.kernel)

    def mistakes(self) -> list[str]:
        """What does not fit together, as `key = value: wanted`."""
        sizes = (
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        )
        wrong = [
            f"{key} = {getattr(self, key)}: wants a number above 0"
            for key in (*sizes, "q_lora_rank", "sliding_window")
            if getattr(self, key) is not None and getattr(self, key) < 1
        ]
        wrong += varlen_mistakes(self.kernel, self.qk_head_dim, self.v_head_dim)
        wrong += [f"rope.{m}" for m in self.rope.mistakes(self.qk_rope_head_dim)]
        return wrong + self._indexer_mistakes()

    def _indexer_mistakes(self) -> list[str]:
        indexer = self.indexer
        if indexer is None:
            return []
        wrong = [f"indexer.{m}" for m in indexer.mistakes()]
        if self.q_lora_rank is None:
            wrong.append(
                "q_lora_rank: the indexer reads the queries' latent; give it a number, or no indexer"
            )
        if self.kernel in ("flex", "varlen"):
            wrong.append(
                f"kernel = {self.kernel!r}: cannot choose keys as an indexer does; use auto, sdpa or eager"
            )
        if indexer.index_head_dim < self.qk_rope_head_dim:
            wrong.append(
                f"indexer.index_head_dim = {indexer.index_head_dim}: wants the {self.qk_rope_head_dim} channels of "
                "qk_rope_head_dim, which turn, or more"
            )
        return wrong


class LatentAttention(nn.Module):
    """o(core(q, k, v)) with k and v, and optionally q, from latents."""

    def __init__(self, config: MlaConfig, hidden_size: int, norm: NormConfig) -> None:
        super().__init__()
        self.config = config
        heads, q_rank, kv_rank = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
        norm = replace(norm, eps=config.latent_norm_eps)
        if q_rank is None:
            self.q_proj = nn.Linear(hidden_size, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_rank, config.bias)
            self.q_a_norm = RMSNorm(q_rank, norm)
            self.q_b_proj = nn.Linear(q_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj = nn.Linear(hidden_size, kv_rank + config.qk_rope_head_dim, config.bias)
        self.kv_a_norm = RMSNorm(kv_rank, norm)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden_size, config.bias)
        self.kv_parts = [kv_rank, config.qk_rope_head_dim]
        self.latents = Latents(config.sliding_window, sum(self.kv_parts))
        core = (config.sliding_window, heads, config.qk_head_dim, config.scores, config.v_head_dim)
        self.indexer: Indexer | None = None
        if config.indexer is None or q_rank is None:
            self.core = AttentionCore(*core)
        else:
            self.indexer = Indexer(config.indexer, hidden_size, q_rank)
            self.core = SparseCore(*core, config.indexer)

    @property
    def rope_key(self) -> RopeKey:
        return self.config.rope, self.config.qk_rope_head_dim

    def score_flops(self, mean_keys: Callable[[int | None], float]) -> float:
        """Forward FLOPs of one token between q, k, v and the output: 2 H (d_qk + d_v) keys, and with an indexer
        2 (n d + n) for each key it scores."""
        config = self.config
        seen, read = mean_keys(config.sliding_window), mean_keys(config.training_keys)
        flops = 2.0 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * read
        if config.indexer is None:
            return flops
        return flops + 2.0 * config.indexer.index_n_heads * (config.indexer.index_head_dim + 1) * seen

    def spared_flops(self, mean_keys: Callable[[int | None], float]) -> float:
        """FLOPs of one token by which backward stays below twice forward: an indexer's inputs have no gradient, and its
        loss looks at the chosen keys only; without a loss all of its backward."""
        config = self.config
        if self.indexer is None or config.indexer is None:
            return 0.0
        a_key = 2.0 * config.indexer.index_n_heads * (config.indexer.index_head_dim + 1)
        projections = 2.0 * sum(m.weight.numel() for m in self.indexer.modules() if isinstance(m, nn.Linear))
        seen, read = mean_keys(config.sliding_window), mean_keys(config.training_keys)
        if config.indexer.index_loss == "none":
            return 2 * (projections + a_key * seen)
        return projections + 2 * a_key * (seen - read)

    def tensor_plan(self) -> TensorPlan:
        """Heads apart; every rank has the latents."""
        heads = self.config.num_attention_heads
        queries = "q_proj" if self.config.q_lora_rank is None else "q_b_proj"
        cuts = {queries: Cut("column", heads), "kv_b_proj": Cut("column", heads), "o_proj": Cut("row", heads)}
        return TensorPlan(cuts, gathers=True)

    def row_factors(self, gamma_H: Tensor) -> dict[str, Tensor]:
        """Factors [H, rows] on each head's rows of projections, the queries' first, that make its scores gamma times as
        large. Keys that turn are shared by all heads and stay as they are (Kimi K2, arXiv:2507.20534)."""
        config = self.config
        gamma_H1 = gamma_H[:, None]
        still_HD = gamma_H1.sqrt().expand(-1, config.qk_nope_head_dim)
        queries = torch.cat((still_HD, gamma_H1.expand(-1, config.qk_rope_head_dim)), dim=1)
        keys = torch.cat((still_HD, torch.ones_like(gamma_H1).expand(-1, config.v_head_dim)), dim=1)
        return {"q_proj" if config.q_lora_rank is None else "q_b_proj": queries, "kv_b_proj": keys}

    def forward(self, x_BTD: Tensor, meta: AttentionMeta) -> Tensor:
        q_latent_BTL = x_BTD if self.config.q_lora_rank is None else self.q_a_norm(self.q_a_proj(x_BTD))
        q_BTHD = self.queries(x_BTD, q_latent_BTL, meta)
        kv_BSL = self.latents(self.keys_and_values(x_BTD, meta))
        index = {}
        if self.indexer is not None:
            index["index"] = self.indexer(x_BTD, q_latent_BTL, *meta.rope[self.rope_key])
        if not self.folds(q_BTHD.shape[1], kv_BSL.shape[1]):
            return self.o_proj(self.core(*self.expanded(q_BTHD, kv_BSL), meta, **index).flatten(2))
        out_BTHL = self.core(*self.folded(q_BTHD, kv_BSL), meta, **index)
        return self.o_proj(torch.einsum("bthl,hdl->bthd", out_BTHL, self.kv_b()[1]).flatten(2))

    def queries(self, x_BTD: Tensor, q_latent_BTL: Tensor, meta: AttentionMeta) -> Tensor:
        """[B, T, H, D], the last channels rotated; from their latent, which is x itself where they have none."""
        config = self.config
        q_BTD = self.q_proj(x_BTD) if config.q_lora_rank is None else self.q_b_proj(q_latent_BTL)
        parts = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        still_BTHD, turned_BTHD = q_BTD.unflatten(2, (-1, sum(parts))).split(parts, dim=-1)
        return torch.cat((still_BTHD, apply_rope(turned_BTHD, *meta.rope[self.rope_key])), dim=-1)

    def keys_and_values(self, x_BTD: Tensor, meta: AttentionMeta) -> Tensor:
        """What those of all heads come from, [B, T, L + D]: the normed latent, and the channels of keys that turn."""
        latent_BTL, turned_BTD = self.kv_a_proj(x_BTD).split(self.kv_parts, dim=-1)
        turned_BT1D = apply_rope(turned_BTD[:, :, None], *meta.rope[self.rope_key])
        return torch.cat((self.kv_a_norm(latent_BTL), turned_BT1D[:, :, 0]), dim=-1)

    def folds(self, tokens: int, keys: int) -> bool:
        """Whether folding kv_b costs fewer multiplications than expanding all `keys`, some of them earlier tokens."""
        latent, head = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        return keys > tokens and tokens * (keys * (2 * latent - head) + latent * head) < keys * latent * head

    def expanded(self, q_BTHD: Tensor, kv_BSL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values for `core`; every head has its own."""
        latent_BSL, turned_BSD = kv_BSL.split(self.kv_parts, dim=-1)
        parts = [self.config.qk_nope_head_dim, self.config.v_head_dim]
        still_BSHD, v_BSHD = self.kv_b_proj(latent_BSL).unflatten(2, (-1, sum(parts))).split(parts, dim=-1)
        turned_BSHD = turned_BSD[:, :, None].expand(-1, -1, still_BSHD.shape[2], -1)
        return q_BTHD, torch.cat((still_BSHD, turned_BSHD), dim=-1), v_BSHD

    def folded(self, q_BTHD: Tensor, kv_BSL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same where all heads read one key and one value, of L channels, to which kv_b is still to be applied."""
        still_BTHD, turned_BTHD = q_BTHD.split([self.config.qk_nope_head_dim, self.kv_parts[1]], dim=-1)
        q_BTHL = torch.einsum("bthd,hdl->bthl", still_BTHD, self.kv_b()[0])
        kv_BS1L = kv_BSL[:, :, None]
        return torch.cat((q_BTHL, turned_BTHD), dim=-1), kv_BS1L, kv_BS1L[..., : self.kv_parts[0]]

    def kv_b(self) -> tuple[Tensor, Tensor]:
        """The weights [H, D, L] that make a head's key, and its value, of a latent."""
        parts = [self.config.qk_nope_head_dim, self.config.v_head_dim]
        k_HDL, v_HDL = self.kv_b_proj.weight.unflatten(0, (-1, sum(parts))).split(parts, dim=1)
        return k_HDL, v_HDL


class Latents(nn.Module):
    """What an attention's keys and values come from. A child of its own, like `core`: the engine puts one in its place
    that remembers, and gives those of all tokens so far."""

    def __init__(self, window: int | None, channels: int) -> None:
        super().__init__()
        self.window = window
        self.channels = channels

    def forward(self, kv_BTL: Tensor) -> Tensor:
        """[B, T, L] -> [B, S, L]."""
        return kv_BTL
