"""nanochat from January 2026 on, the one family with a forward of its own; nanochat_config.py lists its eras.

Different from nanochat_v1, in the order of the forward pass, as of July 2026:
  smear              x_t += lambda * sigmoid(gate(x_t[:24])) * x_(t-1) after the embedding's norm
  residual lambdas   before block i:  x = a_i x + b_i x0, with x0 the smeared embedding
  value embeddings   on every second layer, the last always: v += 3 sigmoid(gate(x[:12])) * table[token]
                     (arXiv:2410.17897)
  sliding windows    pattern SSSL, the last layer long
  sharper attention  q and k times 1.2 after their norm
  backout            before the final norm: x -= lambda * (x after the middle block)
Size is one number, the depth; every constant is a field. A flavor is a depth (`d12`), or a depth as of a day
(`d26@2026-01-18`): the sizes and constants of that day's model. Learning rates are those of July 2026 for all.

Smear looks back over a document's start only where the row is one document; packed documents equal separate ones.

Not of nanochat: multi-token prediction. To its modules a later token is all that it is to a first block: its embedding,
smeared, which their block blends in again, and its entry in a value table of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn

from nanovl.config.schema import OptimizerGroup
from nanovl.models.blocks.attention import Attention, AttentionMeta, MetaBuilder
from nanovl.models.blocks.head import Head
from nanovl.models.blocks.mlp import Mlp
from nanovl.models.blocks.mtp import mtp_modules
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.models.decoder import attention_layers, flops_per_token
from nanovl.models.nanochat_config import ERAS, NanochatConfig
from nanovl.models.nanochat_files import config_from_meta, key_rules
from nanovl.spec import Cut, Inputs, Model, ModelFamily, NanochatSpec, Stream, TensorPlan

# B batch, T tokens, D model channels (head channels in q, k, v), H heads, K key/value heads, V vocabulary


class PreviousToken(nn.Module):
    """x_(t-1), and zeros at a document's start. A child of its own, like `core`: the engine keeps its state there."""

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        shifted_BTD = torch.cat((torch.zeros_like(x_BTD[:, :1]), x_BTD[:, :-1]), dim=1)
        return shifted_BTD * (positions_BT > 0)[..., None]


class Smear(nn.Module):
    """x_t + lambda sigmoid(gate(x_t)) x_(t-1): each token carries a little of the one before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.previous = PreviousToken()
        self.gate = nn.Linear(channels, 1, bias=False)
        self.scale = nn.Parameter(torch.empty(1))

    def tensor_plan(self) -> TensorPlan:
        """Tokens are cut behind it: it needs their neighbours."""
        return TensorPlan(starts=True)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        gate_BT1 = self.scale * self.gate(x_BTD[..., : self.channels]).sigmoid()
        return x_BTD + gate_BT1 * self.previous(x_BTD, positions_BT)


class Blend(nn.Module):
    """a x + b x0: how much of the stream and of the embedding a block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Parameter(torch.empty(1))
        self.embedding = nn.Parameter(torch.empty(1))

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor) -> Tensor:
        return self.stream * x_BTD + self.embedding * x0_BTD


class Backout(nn.Module):
    """x - lambda middle: what the middle of the model knew need not be said again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x_BTD: Tensor, middle_BTD: Tensor) -> Tensor:
        return x_BTD - self.scale * middle_BTD


class NanochatAttention(Attention):
    """Attention whose values may receive a token's own embedding, and whose normed q and k are scaled."""

    def __init__(self, config: NanochatConfig, layer: int, norm: NormConfig) -> None:
        super().__init__(config.attention(layer), config.hidden_size, norm)
        self.qk_scale = config.qk_scale
        self.gate_channels, self.gate_scale = config.value_gate_channels, config.value_gate_scale
        self.value_embed: nn.Embedding | None = None
        if config.has_value_embedding(layer):
            kv_heads = self.config.num_key_value_heads
            self.value_embed = nn.Embedding(config.padded_vocab_size, kv_heads * config.head_dim)
            self.value_gate = nn.Linear(config.value_gate_channels, kv_heads, bias=False)

    def tensor_plan(self) -> TensorPlan:
        """Heads apart, with their gates and their part of the table."""
        plan, kv_heads = super().tensor_plan(), self.config.num_key_value_heads
        if self.value_embed is None:
            return plan
        more = {name: Cut("column", kv_heads) for name in ("value_embed", "value_gate")}
        return replace(plan, cuts={**plan.cuts, **more})

    def forward(self, x_BTD: Tensor, meta: AttentionMeta, tokens_BT: Tensor | None = None) -> Tensor:
        q_BTHD, k_BTKD, v_BTKD = self.qkv(x_BTD, meta)
        if self.value_embed is not None:
            gate_BTK1 = (
                self.gate_scale * self.value_gate(x_BTD[..., : self.gate_channels]).sigmoid()[..., None]
            )
            v_BTKD = v_BTKD + gate_BTK1 * self.value_embed(tokens_BT).view(v_BTKD.shape)
        out_BTHD = self.core(q_BTHD * self.qk_scale, k_BTKD * self.qk_scale, v_BTKD, meta)
        return self.o_proj(out_BTHD.flatten(2))


class NanochatBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), from a blend of stream and embedding."""

    def __init__(self, config: NanochatConfig, layer: int, norm: NormConfig) -> None:
        super().__init__()
        self.blend = Blend() if config.residual_lambdas else None
        self.norm = RMSNorm(config.hidden_size, norm)
        self.mixer = NanochatAttention(config, layer, norm)
        self.ffn = Mlp(config.ffn, config.hidden_size)

    def forward(self, x_BTD: Tensor, inputs: Inputs, x0_BTD: Tensor | None = None) -> Tensor:
        if self.blend is not None:
            x_BTD = self.blend(x_BTD, x0_BTD)
        x_BTD = x_BTD + self.mixer(self.norm(x_BTD), inputs.meta, inputs.tokens_BT)
        return x_BTD + self.ffn(self.norm(x_BTD))


class Nanochat(Model):
    """Tokens -> logits."""

    def __init__(self, config: NanochatConfig) -> None:
        super().__init__()
        self.config = config
        norm = NormConfig(eps=config.norm_eps, weight="none")
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, norm)
        self.layers = nn.ModuleDict({str(i): NanochatBlock(config, i, norm) for i in range(config.depth)})
        self.lm_head = Head(config.hidden_size, config.vocab_size, config.padded_vocab_size, config.softcap)
        self.smear = Smear(config.smear_channels) if config.smear else None
        self.backout = Backout() if config.backout else None
        self.first_children, self.last_children = ["embed_tokens", "smear"], ["lm_head", "backout"]
        if config.mtp is not None:
            like = config.layer_names().index(config.mtp_block())
            block = partial(NanochatBlock, config, like, norm)
            self.mtp = mtp_modules(config.mtp, config.depth, block, config.hidden_size, norm)
            self.mtp_layers, self.mtp_loss_weight = config.mtp.num_layers, config.mtp.loss_weight
            self.last_children += ["mtp", *self.first_children]
        self.meta = MetaBuilder(attention_layers(self))

    def tensor_plan(self) -> TensorPlan:
        """Vocabulary entries apart."""
        size = self.config.padded_vocab_size
        return TensorPlan({"embed_tokens": Cut("vocab", size), "lm_head": Cut("vocab", size)})

    def begin(self, inputs: Inputs) -> Stream:
        x_BTD = self._embed(inputs)
        return (x_BTD, x_BTD) if self.config.residual_lambdas else (x_BTD,)

    def _embed(self, inputs: Inputs) -> Tensor:
        x_BTD: Tensor = self.norm(self.embed_tokens(inputs.tokens_BT))
        return x_BTD if self.smear is None else self.smear(x_BTD, inputs.positions_BT)

    def pass_block(self, index: int, block: nn.Module, stream: Stream, inputs: Inputs) -> Stream:
        """The stream is x, the embedding where blocks read it, and from its block on the middle that is backed out."""
        x_BTD, *rest = stream
        x_BTD = block(x_BTD, inputs, *rest[:1]) if self.config.residual_lambdas else block(x_BTD, inputs)
        middle = [x_BTD] if self.config.backout and index == self.config.depth // 2 else []
        return (x_BTD, *rest, *middle)

    def stream_width(self, layers: int) -> int:
        has_middle = self.config.backout and layers > self.config.depth // 2
        return 1 + self.config.residual_lambdas + has_middle

    def end(self, stream: Stream) -> Tensor:
        return self.norm(self._without_middle(stream))

    def _without_middle(self, stream: Stream) -> Tensor:
        return stream[0] if self.backout is None else self.backout(stream[0], stream[-1])

    def look_ahead(
        self, stream: Stream, ended_BTD: Tensor, ahead_BTU: Tensor, inputs: Inputs
    ) -> list[Tensor]:
        hidden_BTD = ended_BTD if self.config.mtp.hidden == "post_norm" else self._without_middle(stream)
        states = []
        for module, ahead_BT in zip(self.mtp.values(), ahead_BTU.unbind(-1), strict=True):
            later = replace(inputs, tokens_BT=ahead_BT)
            x0_BTD = self._embed(later)
            x_BTD, hidden_BTD = module(hidden_BTD, x0_BTD, later, x0_BTD)
            states.append(x_BTD)
        return states

    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Uniform matrices of deviation hidden^-0.5; outputs zero, so that each block starts as the identity."""
        config, bound = self.config, sqrt(3.0 / self.config.hidden_size)
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        lambdas = {
            "stream": (config.stream_init, config.stream_init_last),
            "embedding": (config.x0_init, config.x0_init_last),
        }
        if leaf in lambdas:
            layer = min(int(name.split(".")[1]), config.depth - 1)  # modules begin like the last layer
            full.copy_(torch.linspace(*lambdas[leaf], config.depth)[layer])
        elif leaf in ("o_proj", "down_proj") or name == "smear.scale":
            full.zero_()
        elif leaf in ("q_proj", "k_proj", "v_proj", "value_embed"):
            full.uniform_(-bound, bound, generator=generator)
        elif leaf == "up_proj":
            bound *= config.mlp_init_scale
            full.uniform_(-bound, bound, generator=generator)
        elif leaf == "eh_proj":
            bound /= sqrt(2.0)  # of two states
            full.uniform_(-bound, bound, generator=generator)
        elif leaf in ("value_gate", "gate"):
            full.uniform_(0.0, config.gate_init, generator=generator)
        elif name == "backout.scale":
            full.fill_(config.backout_init)
        else:
            std = {"embed_tokens": config.embedding_std, "lm_head": config.head_std}[leaf]
            full.normal_(0.0, std, generator=generator)

    def forward_flops_per_token(self, mean_keys: Callable[[int | None], float]) -> float:
        ahead = 0 if self.smear is None else self.mtp_layers * self.smear.gate.weight.numel()
        return flops_per_token(self, mean_keys) + 2.0 * ahead


def optimizer_groups(config: NanochatConfig) -> list[OptimizerGroup]:
    """AdamW for tables and scalars, Muon for the matrices of blocks; learning rates of the depth-12 reference."""
    group = partial(OptimizerGroup, beta1=0.8)
    table = partial(group, scale_with_width=True)
    groups = [
        table(match=r"lm_head\.weight", lr=0.008, beta2=0.96, weight_decay=0.01),
        table(match=r"embed_tokens\.weight", lr=0.3, beta2=0.995, weight_decay=0.001),
    ]
    if config.value_embeddings:
        groups.append(table(match=r".*\.value_embed\.weight", lr=0.15, beta2=0.995, weight_decay=0.01))
    if config.residual_lambdas:
        groups += [
            group(match=r".*\.blend\.stream", lr=0.005, beta2=0.95, weight_decay=0.05),
            group(match=r".*\.blend\.embedding", lr=0.5, beta1=0.96, beta2=0.95, weight_decay=0.0),
        ]
    if config.smear or config.backout:
        few = r"smear\..*|backout\.scale"
        groups.append(group(match=few, lr=0.2, beta2=0.95, weight_decay=0.0, scale_with_batch=False))
    muon = partial(OptimizerGroup, kind="muon", lr=0.02, weight_decay=0.28)
    return [*groups, muon(match=r"(layers|mtp)\..*\.weight", weight_decay_schedule="cosine")]


FLAVORS: dict[str, Callable[[], NanochatConfig]] = {
    **{
        f"d{depth}": partial(NanochatConfig, depth=depth)
        for depth in (20, 4, 6, 8, 10, 12, 14, 16, 18, 24, 26, 32)
    },
    **{
        f"d{depth}@{day}": partial(NanochatConfig, depth=depth, **fields)
        for day, fields in ERAS.items()
        if fields  # the last era is d12 itself
        for depth in (12, 26)
    },
}

FAMILY = ModelFamily(
    name="nanochat",
    summary="nanochat since January 2026: residual lambdas, value embeddings, windows, smear, backout; one dial, depth",
    config=NanochatConfig,
    flavors=FLAVORS,
    model=Nanochat,
    optimizer_groups=optimizer_groups,
    nanochat=NanochatSpec(config_from_meta, key_rules),
)
