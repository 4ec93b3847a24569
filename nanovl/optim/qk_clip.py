"""QK-clip: attention logits cannot grow without bound (MuonClip of Kimi K2, arXiv:2507.20534).

A head whose largest logit S of a step is above the threshold has its later logits scaled by gamma = threshold / S:

    W_q <- sqrt(gamma) W_q,  W_k <- sqrt(gamma) W_k     where every query head has a key head of its own
    W_q <- gamma W_q                                    where a key head also serves query heads that are in bounds

Latent attention has both: its rows that turn are the second kind. Which rows of which projections those are, blocks
say in `row_factors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanovl.dist import all_reduce
from nanovl.errors import ConfigError
from nanovl.models.blocks.attention import AttentionCore
from nanovl.optim.gather import Layout, local_of
from nanovl.optim.groups import shorten

# B batch, T query tokens, S key tokens, D head channels, H query heads, K key heads, G query heads a key head

LOGITS_AT_ONCE = 2**26
"""Numbers of the [B, H, T, S] logits that exist at a time."""


class QkClip:
    """Watches every attention of a model in training mode, and mends its projections when told to.

    To be made after the model is cut and before its first forward, so that compiled blocks know of the hooks. A
    recomputed forward is seen twice, which changes no maximum.
    """

    def __init__(
        self, model: nn.Module, threshold: float, groups: Sequence[dist.ProcessGroup | None] = ()
    ) -> None:
        """`groups` join the ranks that see other tokens with the same heads. Raises ConfigError for layers that cannot
        be mended."""
        layers = {
            name: m for name, m in model.named_modules() if isinstance(getattr(m, "core", None), nn.Module)
        }
        unfit: dict[str, list[str]] = {}
        for name, layer in layers.items():
            unfit.setdefault(_unfit(layer), []).append(name)
        mistakes = [
            f"optimizer.muon.qk_clip = {threshold}: {shorten(names)}: {why}; set it to 0"
            for why, names in unfit.items()
            if why
        ]
        if mistakes:
            raise ConfigError(mistakes, "optimizer")
        self.threshold = threshold
        self.groups = [group for group in groups if group is not None]
        self.layers: list[Any] = list(layers.values())
        self.maxima = [_watch(layer) for layer in self.layers]

    @torch.no_grad()
    def apply(self) -> None:
        """After an update: scale the heads that were out of bounds in the forwards since the last call."""
        if not self.layers:
            return
        largest = torch.cat(self.maxima)
        for group in self.groups:
            all_reduce(largest, "max", group)
        parts = largest.split([len(maxima) for maxima in self.maxima])
        for layer, maxima, largest_H in zip(self.layers, self.maxima, parts, strict=True):
            beyond_H = (largest_H > self.threshold) & (largest_H < inf)
            gamma_H = torch.where(beyond_H, self.threshold / largest_H, 1.0)
            for name, factors_HD in layer.row_factors(gamma_H).items():
                _scale(getattr(layer, name), factors_HD)
            maxima.fill_(-inf)


def _unfit(layer: nn.Module) -> str:
    """Why scaling this attention's projections does not scale its logits; empty if it does."""
    if not hasattr(layer, "row_factors"):
        return "its block does not say which rows of its projections scale a head's logits"
    if getattr(layer, "indexer", None) is not None:
        return "an indexer chooses the keys whose logits count"
    if any(not isinstance(getattr(layer, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm")):
        return "queries and keys are normed, which bounds the logits and undoes any scaling"
    if isinstance(layer.core, AttentionCore) and layer.core.scores.kernel == "varlen":
        return "kernel = 'varlen' makes no masks, which say whose logits count"
    return ""


def _watch(layer: Any) -> Tensor:
    """The largest logit of each of this rank's heads, [H], kept up to date by every training forward."""
    queries = next(iter(layer.row_factors(torch.ones(1))))
    weight = getattr(layer, queries).weight
    heads = layer.config.num_attention_heads // _tensor_ranks(weight)
    maxima_H = torch.full((heads,), -inf, device=local_of(weight).device)

    def watch(core: Any, args: tuple[Any, ...]) -> None:
        if not core.training:
            return
        q_BTHD, k_BTKD, _, meta = args
        with torch.no_grad():
            found_H = max_logits(q_BTHD, k_BTKD, meta.masks[core.window])
            if core.scores.scale is not None:
                found_H = found_H * (core.scores.scale * q_BTHD.shape[-1] ** 0.5)
            maxima_H.copy_(torch.fmax(maxima_H, found_H))  # not-a-number is no maximum

    layer.core.register_forward_pre_hook(watch)
    return maxima_H


@torch.library.custom_op("nanovl::max_logits", mutates_args=())
def max_logits(q_BTHD: Tensor, k_BSKD: Tensor, mask: Tensor | None) -> Tensor:
    """Largest q k / sqrt(D) of each query head over visible keys, [H]; without a mask a token sees those before it.

    An operation of its own, so that a compiler sees one node instead of the chunks, and a recomputation policy no
    matrix products.
    """
    (B, T, H, D), (_, S, K, _) = q_BTHD.shape, k_BSKD.shape
    q_BTKGD = q_BTHD.unflatten(2, (K, H // K))
    index = torch.arange(S, device=q_BTHD.device)
    maxima_H = torch.full((H,), -inf, device=q_BTHD.device)
    step = max(1, LOGITS_AT_ONCE // (B * H * S))
    for start in range(0, T, step):
        stop = min(start + step, T)
        logits = torch.einsum("btkgd,bskd->bkgts", q_BTKGD[:, start:stop], k_BSKD).flatten(1, 2)
        seen = index <= index[start:stop, None] if mask is None else mask[:, :, start:stop]
        logits.masked_fill_(~seen, -inf)
        maxima_H = torch.maximum(maxima_H, logits.amax(dim=(0, 2, 3)).float())
    return maxima_H * D**-0.5


@max_logits.register_fake
def _(q_BTHD: Tensor, k_BSKD: Tensor, mask: Tensor | None) -> Tensor:
    return q_BTHD.new_empty(q_BTHD.shape[2], dtype=torch.float32)


def _tensor_ranks(weight: Tensor) -> int:
    """Ranks that hold different heads."""
    layout = Layout.of(weight)
    if layout.mesh is None:
        return 1
    names = layout.mesh.mesh_dim_names or ()
    axes = layout.axes(lambda dim: dim == 0)
    return prod(layout.mesh.size(axis) for axis in axes if names and names[axis] == "tp")


def _scale(linear: nn.Linear, factors_HD: Tensor) -> None:
    """Multiply each head's rows; a rank's factors are those of its own heads."""
    heads, head_dim = factors_HD.shape
    for parameter in linear.parameters():
        layout = Layout.of(parameter)
        here = () if layout.mesh is None else layout.mesh.get_coordinate() or ()
        rows = layout.piece(here)[0]
        # heads of a tensor rank follow each other, so the remainder is the place among its own
        places = torch.arange(rows.start, rows.stop, device=factors_HD.device) % (heads * head_dim)
        factors = factors_HD.flatten()[places].view(-1, *[1] * (parameter.ndim - 1))
        local_of(parameter).mul_(factors.to(local_of(parameter).device))
