"""Which experts each token goes to, and the forces that keep experts evenly used.

Scores are those of all experts, in float32 whatever the model computes in: softmax or sigmoid of router logits, which
may have a bias and a soft cap. The highest few are chosen, and weigh the experts' outputs; `norm_topk_prob` divides
them by their sum after the choice, as Qwen3-MoE and DeepSeek-V3 do (a softmax over the chosen logits alone, as in
GPT-OSS, comes to the same).

Four forces, all off unless asked for; N = tokens of the whole step, p = scores of a token over their sum:

    bias       selection uses scores + b; after each step b_e += speed * sign(mean load - load of e) (arXiv:2408.15664,
               without re-centring, as in DeepSeek-V3)
    auxiliary  c * E * sum_e f_e mean_N p_e, f = shares of the whole job's choices (arXiv:2101.03961)
    sequence   the same for each row with the row's own f, then the mean over rows (arXiv:2412.19437)
    z          c * mean_N logsumexp(logits)^2 (arXiv:2202.08906)

Their gradients are sums over tokens divided by N, so they are the same on every mesh and for every accumulation. For
the auxiliary loss that takes f of the step before: that of a micro-batch would depend on how rows are split, and this
step's is not known before its last forward. So its first step has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovl.models.blocks.head import softcapped
from nanovl.models.blocks.side_loss import counted, joined

if TYPE_CHECKING:
    from nanovl.models.blocks.moe import MoeConfig

# B rows, T tokens, N = B*T, D model, E experts, A experts of a token


class Routing(NamedTuple):
    """Where tokens go."""

    experts_NA: Tensor
    weights_NA: Tensor
    """Factors on the experts' outputs, float32."""
    counts_E: Tensor
    """Tokens of each expert."""


class Router(nn.Module):
    """Token -> its experts and their weights."""

    counters = ("load",)  # of the step before: without it the auxiliary loss misses a step
    expert_bias: Tensor | None
    load: Tensor | None
    tally: Tensor

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(experts)) if config.router_bias else None
        # counts of this rank's part of each row -> those of whole rows; a child, so that parallelisms can sum them
        self.whole_rows = nn.Identity()
        self.step_tokens = 0  # of all ranks: what the auxiliary losses are means over
        self.register_buffer("expert_bias", torch.zeros(experts) if config.load_balancing == "bias" else None)
        self.register_buffer("load", torch.zeros(experts) if config.aux_loss_coef else None)
        self.register_buffer("tally", torch.zeros(experts + 1, dtype=torch.float64), persistent=False)

    def init_buffers(self, device: torch.device) -> None:
        """Balanced, nothing counted yet."""
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x_BTD: Tensor) -> Routing:
        config = self.config
        bias_E = None if self.bias is None else self.bias.float()
        logits_BTE = softcapped(
            F.linear(x_BTD.float(), self.weight.float(), bias_E), config.router_logit_softcapping
        )
        scores_BTE = logits_BTE.softmax(-1) if config.scoring == "softmax" else logits_BTE.sigmoid()
        chosen_BTA = self.choose(scores_BTE)
        weights_BTA = scores_BTE.gather(-1, chosen_BTA)
        if config.norm_topk_prob:
            weights_BTA = weights_BTA / (weights_BTA.sum(-1, keepdim=True) + 1e-20)
        weights_BTA = weights_BTA * config.routed_scaling_factor
        counts_BE = _counts(chosen_BTA, config.num_experts)
        counts_E = counts_BE.sum(0)
        if torch.is_grad_enabled():
            shares_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
            loss = self._balance_loss(logits_BTE, shares_BTE, counts_BE)
            entropy = torch.special.entr(shares_BTE.detach()).sum()
            seen_E1 = torch.cat((counts_E.double(), entropy.double()[None]))
            weights_BTA = counted(weights_BTA, self.tally, seen_E1)
            if loss is not None:
                weights_BTA = joined(weights_BTA, loss)
        return Routing(chosen_BTA.flatten(0, 1), weights_BTA.flatten(0, 1), counts_E)

    @torch.no_grad()
    def choose(self, scores_BTE: Tensor) -> Tensor:
        """The experts of each token: the best by score and bias, of the best groups where there are groups."""
        config = self.config
        wanted_BTE = scores_BTE if self.expert_bias is None else scores_BTE + self.expert_bias
        if config.n_group > 1:
            groups = wanted_BTE.unflatten(-1, (config.n_group, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            wanted_BTE = groups.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        return wanted_BTE.topk(config.num_experts_per_tok, dim=-1).indices

    @torch.no_grad()
    def rebalance(self, counts_E: Tensor) -> None:
        """Learn from the loads of a step, those of the whole job."""
        if self.expert_bias is not None:
            direction_E = torch.sign(counts_E.mean() - counts_E).to(self.expert_bias.dtype)
            self.expert_bias.add_(direction_E, alpha=self.config.bias_update_speed)
        if self.load is not None:
            self.load.copy_(counts_E / counts_E.sum())

    def _balance_loss(self, logits_BTE: Tensor, shares_BTE: Tensor, counts_BE: Tensor) -> Tensor | None:
        """This micro-batch's part of the step's auxiliary losses; None without any."""
        config = self.config
        terms = []
        if self.load is not None:
            terms.append(config.aux_loss_coef * config.num_experts * (shares_BTE @ self.load).sum())
        if config.sequence_aux_loss_coef:
            counts_BE = self.whole_rows(counts_BE)
            load_B1E = (counts_BE / counts_BE.sum(1, keepdim=True))[:, None]
            terms.append(config.sequence_aux_loss_coef * config.num_experts * (shares_BTE * load_B1E).sum())
        if config.z_loss_coef:
            terms.append(config.z_loss_coef * logits_BTE.logsumexp(-1).square().sum())
        if not terms:
            return None
        assert self.step_tokens, (
            "auxiliary losses are means over the step: begin_step must say how many tokens it has"
        )
        return sum(terms[1:], terms[0]) / self.step_tokens


def _counts(chosen_BTA: Tensor, num_experts: int) -> Tensor:
    """How often each row chose each expert, [B, E]. Adding ones is exact in any order, and asks nothing of the host."""
    chosen_BR = chosen_BTA.flatten(1)
    return chosen_BR.new_zeros(len(chosen_BR), num_experts).scatter_add_(
        1, chosen_BR, torch.ones_like(chosen_BR)
    )
