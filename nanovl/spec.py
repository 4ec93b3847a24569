"""What rooms hand to each other, as plain data: so parallelisms, checkpoint and inference know no family by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from nanovl.config.config_json import ConfigJson
from nanovl.config.schema import OptimizerGroup
from nanovl.errors import ConfigError

IGNORE_INDEX = -100
"""Target that carries no loss."""

Batch = dict[str, Tensor]
"""Rows of one rank: tokens_BT, targets_BT (IGNORE_INDEX = none), positions_BT (restart with each document),
doc_ids_BT (attention stays inside one), all int64, and weights_BT, float32 loss weights."""


class ModelConfig(Protocol):
    """What every family's config can say of itself."""

    vocab_size: int

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def blocks(self) -> Mapping[str, Any]:
        """Block templates by name, each a dataclass."""
        ...

    def layer_names(self) -> list[str]:
        """The template of each layer."""
        ...


FREE = MappingProxyType({"free": True})
"""Metadata of config fields that say how a model begins, learns or runs, but not what its weights compute."""


GROWN = MappingProxyType({"grown": True})
"""Metadata of sections that add parts with weights of their own to a model that works without them."""


def ungrown(config: Any, like: Any) -> Any:
    """A copy of `config` without the GROWN sections that `like`, or what it holds in the same place, lacks."""
    if isinstance(config, dict):
        held = like if isinstance(like, dict) else {}
        return {key: ungrown(value, held.get(key)) for key, value in config.items()}
    if not is_dataclass(config) or isinstance(config, type):
        return config
    changes = {}
    for f in fields(config):
        theirs = getattr(like, f.name, None)
        lacking = f.metadata.get("grown") and theirs is None
        changes[f.name] = None if lacking else ungrown(getattr(config, f.name), theirs)
    return replace(config, **changes)


def computed(config: Any, prefix: str = "") -> dict[str, Any]:
    """What the weights of a config compute: its fields by their dotted names, without those that are FREE."""
    found: dict[str, Any] = {}
    of = (
        config
        if isinstance(config, dict)
        else {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata.get("free")}
    )
    for name, value in of.items():
        nested = isinstance(value, dict) or is_dataclass(value)
        found |= computed(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


@dataclass(frozen=True)
class KeyRule:
    """One line of a key map: how a tensor, a parameter or a persistent buffer, is named by Hugging Face and by us.

    `theirs` and `ours` are names with `{i}` for the layer number. `to_ours` and `to_theirs` convert the values where
    the layout differs (exact inverses); None = as it is.
    """

    theirs: str
    ours: str
    to_ours: Callable[[Tensor], Tensor] | None = None
    to_theirs: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class KeyGroup:
    """The same for tensors that are one there and several here, or the other way round, as experts that are stacked.

    The functions take and return one tensor a name, in the order of the names. They also work out shapes, from tensors
    on the meta device, which have no values. `mistakes` of what is read says what is wrong with the values. Where two
    rules name the same tensor of ours, both are read and the first is written.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_theirs: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    mistakes: Callable[[Sequence[Tensor]], list[str]] | None = None


@dataclass(frozen=True)
class MtpFiles:
    """How a family's checkpoints hold multi-token prediction."""

    depth: str
    """Key of config.json for the number of modules; what tensors there are decides, whatever it says."""
    module: Callable[[str, int], int | None]
    """(name of a tensor, layers of the model) -> the module that it belongs to; None = it belongs to none."""


@dataclass(frozen=True)
class HuggingFaceSpec:
    """How a family's checkpoints look to `transformers`."""

    architecture: str
    """Class name in config.json, such as `Qwen3ForCausalLM`."""
    model_type: str
    """`model_type` there, which also tells families of one class apart."""
    read: Callable[[ConfigJson], Any]
    """config.json -> config; notes there what is wrong with it. `ModelFamily.config_from_hf` is what others call."""
    config_to_hf: Callable[[Any], dict[str, Any]] | None
    """None where files are only read, since transformers has no such class."""
    key_rules: Callable[[Any], Sequence[KeyRule | KeyGroup]]
    """The key map of one config; tied weights are listed once, under the name on disk."""
    mtp: MtpFiles | None = None
    """None where checkpoints of the family have no modules of multi-token prediction."""
    cut_dim: Callable[[str], int | None] | None = None
    """Where files are cut for tensor ranks: (name of a tensor) -> dimension in which its slices follow each other, None
    = it is whole. None where files are not cut."""
    text_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of models with images: what the `text_config` of released files leaves to transformers' class."""


@dataclass(frozen=True)
class NanochatSpec:
    """How a family's checkpoints look to nanochat's own code: `model_*.pt` beside `meta_*.json`."""

    config_from_meta: Callable[[Mapping[str, Any], Mapping[str, Sequence[int]]], Any | None]
    """(meta file, shapes of the tensors by name) -> config; None where the tensors are those of another family."""
    key_rules: Callable[[Any], Sequence[KeyRule | KeyGroup]]
    config_to_meta: Callable[[Any], dict[str, Any]] | None = None
    """config -> `model_config` of a meta file; None where such files are only read."""


@dataclass(frozen=True)
class ModelFamily:
    """One entry of the registry, written at the end of each family's file."""

    name: str
    summary: str
    """One line: what the architecture is known by."""
    config: type[Any]
    """Dataclass that holds every constant of the architecture."""
    flavors: Mapping[str, Callable[[], Any]]
    """Named sizes; the first is the default. Each call makes a fresh config."""
    model: Callable[[Any], Model]
    """Builds the module from its config, on whatever device is current."""
    optimizer_groups: Callable[[Any], list[OptimizerGroup]]
    """Parameter groups used where the job names none."""
    hf: HuggingFaceSpec | None = None
    """None where transformers has no such class."""
    nanochat: NanochatSpec | None = None
    """None where nanochat never was of this kind."""

    def config_from_hf(self, said: Mapping[str, Any]) -> Any:
        """The config of a config.json. Raises ConfigError with everything in it that is wrong, or not computed here."""
        assert self.hf is not None, self.name
        hf = ConfigJson(said, self.name)
        hf.expect(attention_dropout=0.0)
        config = self.hf.read(hf)
        try:
            config.validate()
        except ConfigError as error:
            hf.finish(error.mistakes)
        hf.finish()
        return config


@dataclass(frozen=True)
class ModelSpec:
    """A resolved choice of architecture: the family and the config with the job's overrides in it."""

    family: ModelFamily
    config: Any
    flavor: str = field(default="")


Stream = tuple[Tensor, ...]
"""What one block hands to the next, each [B, T, D]: the residual stream first, then what later blocks still need."""


@dataclass(frozen=True)
class Inputs:
    """What every block of one forward may read besides the stream."""

    tokens_BT: Tensor
    positions_BT: Tensor
    meta: Any
    """Masks and rotation tables, from the model's `meta` child."""


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism cuts one child or one parameter of a module."""

    kind: Literal["column", "row", "vocab", "heads", "width"]
    """`column`: output features of a linear or an embedding; `row`: input features of a linear, whose outputs are
    summed over the ranks; `vocab`: entries of an embedding or a head; `heads`: a parameter with one row a head;
    `width`: an RMS norm over features that are cut."""
    units: int
    """Pieces that cannot be cut further, such as heads. Where ranks outnumber the units of a column, each unit is
    computed by several ranks."""


@dataclass(frozen=True)
class TensorPlan:
    """What tensor parallelism does to a module. Between modules the sequence is cut; parameters that no plan names
    are kept whole on every rank, and their gradients are summed."""

    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """By the name of a child or of an own parameter."""
    gathers: bool = False
    """The first argument arrives cut along the sequence and is needed whole; a `row` child cuts the result again."""
    starts: bool = False
    """The result is whole along the sequence, and is cut for what follows."""


class Model(nn.Module, ABC):
    """What the trainer and the engine ask of a model, or of the part of one that a pipeline stage holds.

    A family writes how the stream begins, passes a block and ends, and how its weights begin. Blocks are named by
    their place in the whole model, so parameter names are the same in every part.
    """

    config: Any
    meta: nn.Module
    """(positions_BT, doc_ids_BT) -> what attention layers share; a child, so that parallelisms can replace it."""
    layers: nn.ModuleDict
    lm_head: nn.Module
    first_children: Sequence[str]
    """Children with parameters that only `begin` needs."""
    last_children: Sequence[str]
    """Children with parameters that only `end`, `look_ahead` and the head need; one named in both is a tied weight."""
    mtp_layers: int = 0
    """Tokens beyond the next one that it predicts too, in training: multi-token prediction (arXiv:2412.19437)."""
    mtp_loss_weight: float = 0.0
    """Factor on the mean of their losses in what is trained."""

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        *,
        stream: Stream | None = None,
        ahead_BTU: Tensor | None = None,
        objective: Callable[..., Any] | None = None,
    ) -> Any:
        """Float32 logits [B, T, V], or what `objective(head, hidden_BTD)` returns.

        So the loss runs inside forward, where FSDP has gathered the head's weight, and logits need not exist all at
        once. Without positions a row counts from 0; without document ids it is one document. A part that does not
        begin the model goes on from `stream`; one without the head returns its stream. With `ahead_BTU`, the tokens 1,
        2, ... places further on, the objective also gets the states that predict the tokens behind those.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        inputs = Inputs(tokens_BT, positions_BT, self.meta(positions_BT, doc_ids_BT))
        stream = self.begin(inputs) if stream is None else stream
        for index, block in self.layers.items():
            stream = self.pass_block(int(index), block, stream, inputs)
        if not hasattr(self, "lm_head"):
            return stream
        states = [self.end(stream)]
        if ahead_BTU is not None:
            states += self.look_ahead(stream, states[0], ahead_BTU, inputs)
        states = [self.whole_rows(x_BTD) for x_BTD in states]
        return self.lm_head(states[0]) if objective is None else objective(self.lm_head, *states)

    def numbered_blocks(self) -> dict[int, nn.Module]:
        """The layers and, where they are, the modules of multi-token prediction, by place in the whole model."""
        return {
            int(i): block
            for i, block in [*self.layers.items(), *getattr(self, "mtp", nn.ModuleDict()).items()]
        }

    def blocks(self) -> list[nn.Module]:
        """The same in order: the units of FSDP, compile and activation checkpointing."""
        return list(self.numbered_blocks().values())

    def pass_block(self, index: int, block: nn.Module, stream: Stream, inputs: Inputs) -> Stream:
        """The stream after block `index` of the whole model."""
        return (block(stream[0], inputs),)

    def stream_width(self, layers: int) -> int:
        """Tensors in the stream after the first `layers` blocks of the whole model."""
        return 1

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As in torch, where weights that are tied on the meta device would come apart."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        super().to_empty(device=device, recurse=recurse)
        for first, *others in names.values():
            for module, _, last in (other.rpartition(".") for other in others):
                setattr(self.get_submodule(module), last, self.get_parameter(first))
        return self

    def init_buffers(self, device: torch.device) -> None:
        """Compute every buffer anew on `device`, needed after to_empty; modules that have some bring this method."""
        for module in self.modules():
            init = getattr(module, "init_buffers", None)
            if module is not self and callable(init):
                init(device)

    def counter_names(self) -> set[str]:
        """Persistent buffers that modules declare as `counters`, which remember steps of training. Weights may lack
        them, or have them unasked, since they may begin anew."""
        declared = [
            (prefix, name) for prefix, m in self.named_modules() for name in getattr(m, "counters", ())
        ]
        return {f"{prefix}.{name}" for prefix, name in declared} & self.state_dict().keys()

    @abstractmethod
    def begin(self, inputs: Inputs) -> Stream:
        """The stream before the first block."""

    @abstractmethod
    def end(self, stream: Stream) -> Tensor:
        """The states [B, T, D] that the head reads."""

    def look_ahead(
        self, stream: Stream, ended_BTD: Tensor, ahead_BTU: Tensor, inputs: Inputs
    ) -> list[Tensor]:
        """The states with which a model of `mtp_layers` predicts later tokens; `ended_BTD` = those of `end`."""
        raise NotImplementedError(f"{type(self).__name__} predicts the next token alone")

    def whole_rows(self, x_BTD: Tensor) -> Tensor:
        """What the head gets of these states; tensor parallelism puts rows together here."""
        return x_BTD

    @abstractmethod
    def init_parameter(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Fill `full`, the whole unsharded parameter `name`, from `generator` alone."""

    @abstractmethod
    def forward_flops_per_token(self, mean_keys: Callable[[int | None], float]) -> float:
        """Forward FLOPs of one token (2 a multiply-add); `mean_keys(window)` = keys a query sees on average."""


class ExpertLayer(nn.Module, ABC):
    """What parallelisms and load balancing ask of a layer that sends each token to a few of its experts."""

    num_experts: int
    num_experts_per_tok: int
    inner_dims: Mapping[str, int]
    """Which dimension of the experts' parameters, stacked [experts, ...], is the inner one; a bias of the output,
    [experts, D], has none."""
    router: Any
    """x [B, T, D] -> where tokens go. Has a buffer `tally`, `step_tokens`, `rebalance(counts)` and a child
    `whole_rows`: models/blocks/router.py says what they are."""
    dispatch: Any
    """Has send, receive, give_back. A child, so that parallelisms can put another one around it."""
    experts: Any
    """(rows grouped by expert, rows of each expert) -> rows; `compute` takes the weights by name as well."""

    @abstractmethod
    def graphs(self) -> list[nn.Module]:
        """Parts that can be compiled whole: nothing in them depends on where tokens go, but for the number of rows."""

    @property
    def active_weights(self) -> int:
        """Weights of router and experts that multiply a token, in a layer that is whole."""
        experts: int = sum(p.numel() for p in self.experts.parameters() if p.ndim > 2)  # biases only add
        return int(self.router.weight.numel()) + experts * self.num_experts_per_tok // self.num_experts


def expert_layers(module: nn.Module) -> list[ExpertLayer]:
    """The expert layers in `module`, in order."""
    return [m for m in module.modules() if isinstance(m, ExpertLayer)]


def run_batch(
    model: Model,
    batch: Batch,
    objective: Callable[..., Any],
    *,
    documents: bool = True,
    stream: Stream = (),
) -> Any:
    """What `objective(head, hidden_BTD, batch)` returns of a model or its last part, or another part's stream.

    `documents` = attention stays inside a document. Of a batch with `ahead_BTU` the objective gets the states of
    `Model.look_ahead` as further arguments.
    """
    return model(
        batch["tokens_BT"],
        batch["positions_BT"],
        batch["doc_ids_BT"] if documents else None,
        stream=stream or None,
        ahead_BTU=batch.get("ahead_BTU"),
        objective=lambda head, x_BTD, *ahead: objective(head, x_BTD, batch, *ahead),
    )


def serving_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that run outside of training too: all but those of multi-token prediction."""
    skipped = set(getattr(model, "mtp", nn.ModuleDict()).modules())
    return (module for module in model.modules() if module not in skipped)
