"""Mixture of experts (arXiv:1701.06538): each token goes through a few of many MLPs, and through a shared one.

No token is dropped. Token copies are sorted by expert; then one grouped matrix product serves all experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.models.blocks.mlp import Activation, Mlp, MlpConfig, activated
from nanovl.models.blocks.router import Router, Routing
from nanovl.spec import FREE, ExpertLayer

# B rows, T tokens, N = B*T, D model, F ffn, E experts, A experts of a token, R = N*A token copies
# (in the experts themselves, E and R are those that are here)


@dataclass(kw_only=True)
class MoeConfig:
    kind: Literal["moe"] = "moe"
    """Tells it from an `mlp`."""
    num_experts: int
    """Experts to choose from."""
    num_experts_per_tok: int
    """Experts a token goes through."""
    moe_intermediate_size: int
    """Width of each between its projections."""
    activation: Activation = "silu"
    """As of `mlp`; experts are always gated."""
    bias: bool = False
    """Biases of all projections of experts, the shared one's too."""
    router_bias: bool = False
    """Biases of router logits."""
    router_logit_softcapping: float | None = None
    """Router logits become cap * tanh(logits / cap) before they are scored."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of router logits."""
    norm_topk_prob: bool = True
    """Divide the chosen scores by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the chosen scores after that."""
    n_group: int = 1
    """Groups of neighbouring experts; a token's experts come from its `topk_group` best groups, each judged by its two
    best experts (arXiv:2412.19437)."""
    topk_group: int = 1
    """Groups a token may choose from."""
    shared_expert_intermediate_size: int = 0
    """Width of an MLP that every token goes through as well; 0 = none."""
    shared_expert_gate: bool = False
    """Its output times a learned sigmoid of the token."""
    shared_expert_activation: Activation | None = None
    """Its activation; none = that of the experts."""
    output_scale: float = 1.0
    """Factor on the sum of all outputs, the shared expert's too."""
    load_balancing: Literal["none", "bias"] = "none"
    """`bias`: experts with fewer tokens than the mean become easier to choose, by steps of `bias_update_speed`."""
    bias_update_speed: float = field(default=0.001, metadata=FREE)
    """Change of every expert's bias a step, in units of a score; 0 = biases stay as they are loaded."""
    aux_loss_coef: float = field(default=0.0, metadata=FREE)
    """Weight of the Switch loss over the whole job's loads."""
    sequence_aux_loss_coef: float = field(default=0.0, metadata=FREE)
    """Weight of the same loss for each row."""
    z_loss_coef: float = field(default=0.0, metadata=FREE)
    """Weight of the squared log-sum-exp of router logits."""

    def mistakes(self) -> list[str]:
        """What does not fit together, as `key = value: wanted`."""
        wrong = [
            f"{key} = {getattr(self, key)}: wants a number above 0"
            for key in (
                "num_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "n_group",
                "topk_group",
            )
            if getattr(self, key) < 1
        ]
        wrong += [
            f"{key} = {getattr(self, key)}: wants 0 or more"
            for key in (
                "shared_expert_intermediate_size",
                "bias_update_speed",
                "aux_loss_coef",
                "sequence_aux_loss_coef",
                "z_loss_coef",
            )
            if getattr(self, key) < 0
        ]
        wrong += [
            f"{key} = {value}: wants a number above 0"
            for key in ("router_logit_softcapping", "output_scale")
            if (value := getattr(self, key)) is not None and value <= 0
        ]
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            wrong.append(
                "shared_expert_gate = true: there is no shared expert; set shared_expert_intermediate_size"
            )
        if self.shared_expert_activation and not self.shared_expert_intermediate_size:
            wrong.append(
                f"shared_expert_activation = {self.shared_expert_activation!r}: there is no shared expert; set "
                "shared_expert_intermediate_size"
            )
        if self.norm_topk_prob and self.num_experts_per_tok == 1:
            wrong.append(
                "norm_topk_prob = true: a single expert's weight would always be 1 and its router learn nothing; "
                "set it to false"
            )
        return wrong or self._choice_mistakes()

    def _choice_mistakes(self) -> list[str]:
        experts, groups, active = self.num_experts, self.n_group, self.num_experts_per_tok
        if active > experts:
            return [f"num_experts_per_tok = {active}: wants at most num_experts = {experts}"]
        if groups > 1 and (experts % groups or experts // groups < 2):
            return [
                f"n_group = {groups}: wants a divisor of num_experts = {experts}, with 2 experts or more a group"
            ]
        if self.topk_group > groups:
            return [f"topk_group = {self.topk_group}: wants at most n_group = {groups}"]
        reach = experts // groups * self.topk_group
        if active > reach:
            return [f"num_experts_per_tok = {active}: wants at most the {reach} experts of topk_group groups"]
        return []


class Moe(ExpertLayer):
    """output_scale x (sum over the chosen experts of weight x expert(x), + shared expert(x))."""

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.inner_dims = {
            "gate_proj": 1,
            "up_proj": 1,
            "down_proj": 2,
            "gate_proj_bias": 1,
            "up_proj_bias": 1,
        }
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.output_scale = config.output_scale
        self.router = Router(config, hidden_size)
        self.dispatch = Dispatch()
        self.experts = Experts(config, hidden_size)
        shared = MlpConfig(
            intermediate_size=config.shared_expert_intermediate_size,
            activation=config.shared_expert_activation or config.activation,
            bias=config.bias,
        )
        self.shared_expert = Mlp(shared, hidden_size) if shared.intermediate_size else None
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        sent = self.dispatch.send(x_BTD.flatten(0, 1), self.router(x_BTD))
        shared_BTD = self._shared(x_BTD)  # computed while tokens travel
        out_RD = self.experts(*self.dispatch.receive(sent))
        out_BTD = self.dispatch.give_back(out_RD, sent).view_as(x_BTD)
        out_BTD = out_BTD if shared_BTD is None else out_BTD + shared_BTD
        return out_BTD if self.output_scale == 1.0 else self.output_scale * out_BTD

    def graphs(self) -> list[nn.Module]:
        """Shared expert and activation."""
        return [self.experts.inner, *([] if self.shared_expert is None else [self.shared_expert])]

    def _shared(self, x_BTD: Tensor) -> Tensor | None:
        if self.shared_expert is None:
            return None
        out_BTD: Tensor = self.shared_expert(x_BTD)
        return (
            out_BTD if self.shared_expert_gate is None else self.shared_expert_gate(x_BTD).sigmoid() * out_BTD
        )


@dataclass(frozen=True)
class Sent:
    """Token copies on their way to the experts, and how they come back."""

    rows_RD: Tensor
    """Sorted by expert, in the order of tokens for each."""
    counts_E: Tensor
    places_NA: Tensor
    """Row of each token's copies."""
    order_R: Tensor
    """The reverse: which of the N*A copies a row is."""
    weights_NA: Tensor


class Dispatch(nn.Module):
    """Takes tokens to experts, all of which are here, and brings them back. A child of the layer, like `core` of
    attention: expert parallelism puts another one around it."""

    def send(self, x_ND: Tensor, routing: Routing) -> Sent:
        """Copy and sort tokens by expert."""
        order_R = routing.experts_NA.flatten().argsort(stable=True)
        active = routing.experts_NA.shape[1]
        places_R = torch.empty_like(order_R)
        places_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        places_NA = places_R.view(-1, active)
        rows_RD = _Take.apply(x_ND, order_R // active, places_NA)
        return Sent(rows_RD, routing.counts_E, places_NA, order_R, routing.weights_NA)

    def receive(self, sent: Sent) -> tuple[Tensor, Tensor]:
        """Rows grouped by expert, and how many belong to each."""
        return sent.rows_RD, sent.counts_E

    def give_back(self, out_RD: Tensor, sent: Sent) -> Tensor:
        """The experts' outputs of each token, weighted and added up, [N, D]."""
        active = sent.places_NA.shape[1]
        out_RD = _Take.apply(out_RD, sent.places_NA.flatten(), sent.order_R[:, None])
        out_NAD = out_RD.unflatten(0, (-1, active))
        return torch.bmm(sent.weights_NA[:, None].to(out_NAD.dtype), out_NAD)[:, 0]


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of each expert, for the rows that are its; each projection with its bias, if any."""

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        experts, inner = config.num_experts, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, inner))
        if config.bias:
            self.gate_proj_bias = nn.Parameter(torch.empty(experts, inner))
            self.up_proj_bias = nn.Parameter(torch.empty(experts, inner))
            self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden_size))
        self.inner = GatedActivation(config.activation)

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        return self.compute(x_RD, counts_E, dict(self.named_parameters()))

    def compute(self, x_RD: Tensor, counts_E: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """With the weights, by name, as plain tensors; the first `counts_E[0]` rows are expert 0's, and so on to the
        last row."""
        product = grouped_product if can_group(weights["gate_proj"]) else product_by_expert

        def project(x: Tensor, name: str) -> Tensor:
            out, bias = product(x, weights[name], counts_E), weights.get(f"{name}_bias")
            return out if bias is None else out + _BiasOfRows.apply(bias, counts_E, len(x))

        return project(self.inner(project(x_RD, "gate_proj"), project(x_RD, "up_proj")), "down_proj")


class GatedActivation(nn.Module):
    """act(gate) * up; a module of its own, so that it can be compiled into one kernel."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate_RF: Tensor, up_RF: Tensor) -> Tensor:
        return activated(self.activation, up_RF, gate_RF)


def can_group(weight_EFD: Tensor) -> bool:
    """Whether torch has a grouped product for such weights: rows of whole 16 bytes, and on a GPU bfloat16 from compute
    capability 8.0 on."""
    aligned = all(weight_EFD.element_size() * size % 16 == 0 for size in weight_EFD.shape[1:])
    if weight_EFD.device.type == "cuda":
        capable = torch.cuda.get_device_capability(weight_EFD.device) >= (8, 0)
        return aligned and weight_EFD.dtype == torch.bfloat16 and capable
    return aligned and weight_EFD.device.type == "cpu"


def grouped_product(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """x times its expert's weight transposed, in one kernel. Rows that the counts do not cover stay uninitialised."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    out_RF = F.grouped_mm(x_RD, weight_EFD.transpose(-2, -1), offs=ends_E)
    if out_RF.requires_grad:
        out_RF.register_hook(_dense)
    return out_RF


def _dense(gradient: Tensor) -> Tensor:
    """The grouped product's backward takes no strides of 0, such as the gradient of a sum has."""
    return (
        gradient.clone(memory_format=torch.contiguous_format)
        if 0 in gradient.stride()
        else gradient.contiguous()
    )


def product_by_expert(x_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """The same, one expert after the other; waits for the counts on the host."""
    parts = x_RD.split(counts_E.tolist())
    return torch.cat([F.linear(x, weight) for x, weight in zip(parts, weight_EFD.unbind(), strict=True)])


class _BiasOfRows(torch.autograd.Function):
    """Each row's expert's bias. Backward sums in float32, row after row: in the same order every time."""

    @staticmethod
    def forward(ctx: Any, bias_EF: Tensor, counts_E: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(counts_E)
        return bias_EF.repeat_interleave(counts_E, dim=0, output_size=rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (counts_E,) = ctx.saved_tensors
        sums_EF = torch.segment_reduce(grads[0].float(), "sum", lengths=counts_E, initial=0.0)
        return sums_EF.to(grads[0].dtype), None, None


class _Take(torch.autograd.Function):
    """x[index]. Where each row of x has gone is known, so backward gathers and adds up instead of scattering: in the
    same order every time."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index_R: Tensor, places_NA: Tensor) -> Tensor:
        ctx.save_for_backward(places_NA)
        return x_ND.index_select(0, index_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (places_NA,) = ctx.saved_tensors
        copies_NAD = grads[0].index_select(0, places_NA.flatten()).unflatten(0, places_NA.shape)
        return copies_NAD.sum(1), None, None
