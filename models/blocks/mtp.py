"""Multi-token prediction (arXiv:2412.19437, section 2.2): modules behind the last layer that predict later tokens.

Depth k = 1, 2, ... at place t of a row, with the model's own embedding and head:

    x_k = block(eh_proj([enorm(emb(token t+k)), hnorm(h_(k-1))]))       h_0 = the model's states
    logits of token t+k+1 = head(norm_k(x_k))

`post_norm` hands on h_k = norm_k(x_k), and h_0 behind the model's last norm, which is how transformers computes the
modules of DeepSeek-V3 and GLM-4.5; `pre_norm` hands on x_k, and h_0 before that norm, as torchtitan does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nanovl.models.blocks.norm import NormConfig, RMSNorm
from nanovl.spec import FREE, IGNORE_INDEX, Batch, Inputs

# B batch, T tokens, D model, U depths


@dataclass(kw_only=True)
class MtpConfig:
    num_layers: int = 1
    """Depths: how many tokens beyond the next one are predicted, each by a module of its own."""
    block: str | None = None
    """Template of the modules' layers; none = that of the last layer."""
    hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """States that a depth hands on to the next: behind its last norm, or before."""
    loss_weight: float = field(default=0.3, metadata=FREE)
    """Factor on the mean of the depths' losses; DeepSeek-V3 began with 0.3 and ended with 0.1."""

    def mistakes(self, blocks: Collection[str]) -> list[str]:
        """What does not fit together, as `key = value: wanted`; `blocks` = the templates there are."""
        wrong = []
        if self.num_layers < 1:
            wrong.append(
                f"num_layers = {self.num_layers}: wants 1 or more; set mtp to none to predict one token alone"
            )
        if self.loss_weight <= 0:
            wrong.append(
                f"loss_weight = {self.loss_weight}: wants a number above 0; set mtp to none to train without"
            )
        if self.block is not None and self.block not in blocks:
            wrong.append(f"block = {self.block!r}: is no block; choose from {', '.join(blocks)}")
        return wrong


class MtpModule(nn.Module):
    """One depth: the states of the depth before and the embeddings of later tokens -> states for the head."""

    def __init__(self, config: MtpConfig, block: nn.Module, hidden_size: int, norm: NormConfig) -> None:
        super().__init__()
        self.hands_on_normed = config.hidden == "post_norm"
        self.enorm = RMSNorm(hidden_size, norm)
        self.hnorm = RMSNorm(hidden_size, norm)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.norm = RMSNorm(hidden_size, norm)

    def forward(
        self, hidden_BTD: Tensor, embedded_BTD: Tensor, inputs: Inputs, *stream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> states for the head, states for the next depth; `stream` = what the block reads beside x_BTD."""
        both_BTD = torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), dim=-1)
        x_BTD = self.block(self.eh_proj(both_BTD), inputs, *stream)
        normed_BTD = self.norm(x_BTD)
        return normed_BTD, normed_BTD if self.hands_on_normed else x_BTD


def mtp_modules(
    config: MtpConfig, first: int, make_block: Callable[[], nn.Module], hidden_size: int, norm: NormConfig
) -> nn.ModuleDict:
    """One a depth, numbered on from the layers, as in DeepSeek's checkpoints; `first` = how many layers there are."""
    return nn.ModuleDict(
        {str(first + k): MtpModule(config, make_block(), hidden_size, norm) for k in range(config.num_layers)}
    )


def with_ahead(batch: Batch, depths: int) -> Batch:
    """`batch`, whole rows, with what depths 1, 2, ... read and predict: tokens `ahead_BTU`, `ahead_targets_BTU` and
    `ahead_weights_BTU`.

    Depth k at place t has token, target and weight of place t + k. Where that is in another row or document there is no
    target; what is read there instead does not matter, since no place with a target sees it.
    """
    if depths == 0:
        return batch
    doc_ids_BT, ahead = batch["doc_ids_BT"], []
    for k in range(1, depths + 1):
        doc_BT, token_BT, target_BT, weight_BT = (
            batch[key].roll(-k, dims=1) for key in ("doc_ids_BT", "tokens_BT", "targets_BT", "weights_BT")
        )
        outside_BT = doc_BT != doc_ids_BT
        outside_BT[:, -k:] = True
        ahead.append((token_BT, target_BT.masked_fill(outside_BT, IGNORE_INDEX), weight_BT))
    names = ("ahead_BTU", "ahead_targets_BTU", "ahead_weights_BTU")
    return {
        **batch,
        **{name: torch.stack(each, -1) for name, each in zip(names, zip(*ahead, strict=True), strict=True)},
    }
