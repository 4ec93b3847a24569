"""A decoder-only transformer composed from typed blocks: every family but current nanochat is a DecoderConfig.

Layers are named templates laid out by prefix + tiled pattern + suffix, so one key changes all layers of a kind:
`--model.blocks.full.mixer.sliding_window=1024`. There is no branch on a family's name anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from nanovl.config.schema import OptimizerGroup
from nanovl.models.blocks.attention import Attention, AttentionConfig, AttentionCore, MetaBuilder, raise_if
from nanovl.models.blocks.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from nanovl.models.blocks.head import Head
from nanovl.models.blocks.init import InitConfig, initialize
from nanovl.models.blocks.mla import LatentAttention, MlaConfig
from nanovl.models.blocks.mlp import Mlp, MlpConfig
from nanovl.models.blocks.moe import Moe, MoeConfig
from nanovl.models.blocks.mtp import MtpConfig, mtp_modules
from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.spec import FREE, GROWN, Cut, Inputs, Model, Stream, TensorPlan, expert_layers

# B batch, T tokens, D model, V vocabulary


def _told_by_kind(default: str, **configs: type[Any]) -> Discriminator:
    """Which of `configs` a section is, so that errors speak of that one alone."""

    def tag(given: Any) -> str | None:
        kind = given.get("kind", default) if isinstance(given, dict) else getattr(given, "kind", None)
        return configs[kind].__name__ if isinstance(kind, str) and kind in configs else None

    kinds = " or ".join(map(repr, configs))
    return Discriminator(
        tag, custom_error_type="kind", custom_error_message=f"wants a table with a `kind` that is {kinds}"
    )


MixerConfig = Annotated[
    Annotated[AttentionConfig, Tag("AttentionConfig")]
    | Annotated[MlaConfig, Tag("MlaConfig")]
    | Annotated[GatedDeltaNetConfig, Tag("GatedDeltaNetConfig")],
    _told_by_kind("attention", attention=AttentionConfig, mla=MlaConfig, gated_delta_net=GatedDeltaNetConfig),
]
FfnConfig = Annotated[
    Annotated[MlpConfig, Tag("MlpConfig")] | Annotated[MoeConfig, Tag("MoeConfig")],
    _told_by_kind("mlp", mlp=MlpConfig, moe=MoeConfig),
]


@dataclass(kw_only=True)
class BlockConfig:
    mixer: MixerConfig
    """Mixes tokens."""
    ffn: FfnConfig
    """Mixes channels."""
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """x + f(norm x), x + norm f(x) (OLMo 2, arXiv:2501.00656), or both norms: x + norm f(norm x) (Gemma)."""


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
    embed_scale: float | Literal["sqrt_hidden_size"] = 1.0
    """Factor on embeddings, rounded to their dtype first."""
    embed_norm: bool = False
    """Norm right after the embedding."""
    logit_scale: float = 1.0
    """Factor on logits, before their cap."""
    final_logit_softcapping: float | None = None
    """Logits become cap * tanh(logits / cap)."""
    max_position_embeddings: int = 4096
    """Context the checkpoint is meant for, tokens."""
    init: InitConfig = field(default_factory=InitConfig, metadata=FREE)
    """How weights begin."""
    mtp: MtpConfig | None = field(default=None, metadata=GROWN)
    """Multi-token prediction: modules that predict later tokens too, in training."""

    def layer_names(self) -> list[str]:
        """The template of each layer: prefix, then the pattern tiled, then suffix."""
        tiled = self.num_hidden_layers - len(self.prefix) - len(self.suffix)
        return [*self.prefix, *(self.pattern[i % len(self.pattern)] for i in range(tiled)), *self.suffix]

    def layers(self) -> list[BlockConfig]:
        """One template a layer."""
        return [self.blocks[name] for name in self.layer_names()]

    def mtp_block(self) -> str:
        """The template of layers that predict ahead, where there are any."""
        return (self.mtp.block if self.mtp else None) or self.layer_names()[-1]

    def validate(self) -> None:
        """Raises ConfigError with everything that does not fit together."""
        wrong = []
        positive = (
            "vocab_size",
            "hidden_size",
            "logit_scale",
            "final_logit_softcapping",
            "max_position_embeddings",
        )
        for key in (*positive, *(["embed_scale"] if self.embed_scale != "sqrt_hidden_size" else [])):
            value = getattr(self, key)
            if value is not None and value <= 0:
                wrong.append(f"{key} = {value}: wants a number above 0")
        if self.norm.eps < 0:
            wrong.append(f"norm.eps = {self.norm.eps}: wants 0 or more")
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
            wrong += [f"blocks.{name}.ffn.{m}" for m in block.ffn.mistakes()]
        wrong += [f"init.{m}" for m in self.init.mistakes()]
        wrong += [f"mtp.{m}" for m in self.mtp.mistakes(self.blocks)] if self.mtp else []
        raise_if(wrong)


MIXERS: dict[type[Any], Callable[[Any, int, NormConfig], nn.Module]] = {
    AttentionConfig: Attention,
    MlaConfig: LatentAttention,
    GatedDeltaNetConfig: GatedDeltaNet,
}
"""Config class -> what mixes tokens: (config, hidden size, norm) -> module of (x_BTD, meta)."""
FFNS: dict[type[Any], Callable[[Any, int], nn.Module]] = {MlpConfig: Mlp, MoeConfig: Moe}
"""Config class -> what mixes channels: (config, hidden size) -> module of (x_BTD)."""


class Block(nn.Module):
    """x + mixer(x), then x + ffn(x), each with a norm before, behind, or both."""

    def __init__(self, config: BlockConfig, hidden_size: int, norm: NormConfig) -> None:
        super().__init__()
        pre, post = config.norm_placement != "post", config.norm_placement != "pre"
        self.mixer_pre_norm = RMSNorm(hidden_size, norm) if pre else nn.Identity()
        self.mixer = MIXERS[type(config.mixer)](config.mixer, hidden_size, norm)
        self.mixer_post_norm = RMSNorm(hidden_size, norm) if post else nn.Identity()
        self.ffn_pre_norm = RMSNorm(hidden_size, norm) if pre else nn.Identity()
        self.ffn = FFNS[type(config.ffn)](config.ffn, hidden_size)
        self.ffn_post_norm = RMSNorm(hidden_size, norm) if post else nn.Identity()

    def forward(self, x_BTD: Tensor, inputs: Inputs) -> Tensor:
        x_BTD = x_BTD + self.mixer_post_norm(self.mixer(self.mixer_pre_norm(x_BTD), inputs.meta))
        return x_BTD + self.ffn_post_norm(self.ffn(self.ffn_pre_norm(x_BTD)))


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
        self.first_children = ["embed_tokens", "embed_norm"]
        last = ["norm", "lm_head", *(["embed_tokens"] if config.tie_word_embeddings or config.mtp else [])]
        if config.mtp is not None:
            template = config.blocks[config.mtp_block()]
            block = partial(Block, template, config.hidden_size, config.norm)
            self.mtp = mtp_modules(
                config.mtp, config.num_hidden_layers, block, config.hidden_size, config.norm
            )
            self.mtp_layers, self.mtp_loss_weight = config.mtp.num_layers, config.mtp.loss_weight
            last.append("mtp")
        self.last_children = last
        self.meta = MetaBuilder(attention_layers(self))

    def tensor_plan(self) -> TensorPlan:
        """Vocabulary entries apart."""
        size = self.config.vocab_size
        return TensorPlan({"embed_tokens": Cut("vocab", size), "lm_head": Cut("vocab", size)})

    def begin(self, inputs: Inputs) -> Stream:
        return (self.embed_norm(self._embed(inputs.tokens_BT)),)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.embed_tokens(tokens_BT)
        scale = self.config.embed_scale
        scale = self.config.hidden_size**0.5 if scale == "sqrt_hidden_size" else scale
        if scale != 1.0:
            x_BTD = x_BTD * torch.tensor(scale, dtype=x_BTD.dtype).item()
        return x_BTD

    def end(self, stream: Stream) -> Tensor:
        return self._for_head(self.norm(stream[0]))

    def _for_head(self, x_BTD: Tensor) -> Tensor:
        # the head is linear, so its logits are scaled with what it reads
        return x_BTD if self.config.logit_scale == 1.0 else self.config.logit_scale * x_BTD

    def look_ahead(
        self, stream: Stream, ended_BTD: Tensor, ahead_BTU: Tensor, inputs: Inputs
    ) -> list[Tensor]:
        hidden_BTD = ended_BTD if self.config.mtp.hidden == "post_norm" else stream[0]
        states = []
        for module, ahead_BT in zip(self.mtp.values(), ahead_BTU.unbind(-1), strict=True):
            x_BTD, hidden_BTD = module(hidden_BTD, self._embed(ahead_BT), inputs)
            states.append(self._for_head(x_BTD))
        return states

    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        config = self.config
        norm_start = 0.0 if config.norm.weight == "zeros" else 1.0
        initialize(config.init, name, full, generator, layers=config.num_hidden_layers, norm_start=norm_start)

    def forward_flops_per_token(self, mean_keys: Callable[[int | None], float]) -> float:
        return flops_per_token(self, mean_keys)


def adamw_groups(config: DecoderConfig) -> list[OptimizerGroup]:
    """AdamW for all; only matrices decay, those of experts and routers too."""
    return [
        OptimizerGroup(match=r"(layers|mtp)\..*(_proj(\.weight)?|router\.weight)|lm_head\.weight"),
        OptimizerGroup(match=r".*", weight_decay=0.0),
    ]


def attention_layers(model: nn.Module) -> list[Any]:
    """The layers of `model` around an attention core, in order."""
    return [m for m in model.modules() if isinstance(getattr(m, "core", None), AttentionCore)]


def flops_per_token(model: Model, mean_keys: Callable[[int | None], float]) -> float:
    """Forward FLOPs of one token: every weight that multiplies it, and what mixes it with others."""
    mixers: list[Any] = [m for m in model.modules() if hasattr(m, "score_flops")]
    return matmul_flops_per_token(model) + sum(m.score_flops(mean_keys) for m in mixers)


def matmul_flops_per_token(model: Model) -> float:
    """2 FLOPs for every weight that multiplies a token: linears, its experts and their router, the head (tied or not);
    of multi-token prediction once more for each depth; no embedding look-up."""
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    experts = sum(layer.active_weights for layer in expert_layers(model))
    heads = sum(m.vocab_size * m.weight.shape[1] for m in model.modules() if isinstance(m, Head))
    return 2.0 * (linears + experts + heads * (1 + model.mtp_layers))
