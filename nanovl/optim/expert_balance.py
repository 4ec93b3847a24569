"""How evenly experts are used, over the whole job: measured every step, and evened out.

Routers count in backward (models/blocks/router.py). Before the optimizer's step the counts of all ranks that saw other
tokens are added up, so every rank moves every bias alike, and a step that is skipped moves none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovl.dist import all_reduce
from nanovl.mesh import Mesh
from nanovl.spec import expert_layers

# E experts


class ExpertBalance:
    """The expert layers of a model, or of a part. All ranks call begin_step and end_step around every step."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.layers, self.mesh = expert_layers(model), mesh
        self.device = next(model.parameters()).device
        self.anywhere = self._over_stages(torch.tensor(float(len(self.layers)))).item() > 0
        self.tallies: list[Tensor] = []
        """Of the last step: for each layer, tokens of each expert and the sum of the tokens' entropies."""

    def begin_step(self, tokens: int) -> None:
        """`tokens` of all ranks and micro-batches: what auxiliary losses are means over."""
        for layer in self.layers:
            layer.router.step_tokens = tokens

    @torch.no_grad()
    def end_step(self, *, update: bool) -> None:
        """Add up what all ranks counted since the last call; `update` = even out the loads."""
        if not self.layers:
            return
        tallies = [layer.router.tally for layer in self.layers]
        total = torch.cat(tallies)
        for axis in ("loss", "tp"):  # tensor ranks route their own piece of the sequence
            if self.mesh.size(axis) > 1:
                all_reduce(total, group=self.mesh.group(axis))
        self.tallies = list(total.split([len(tally) for tally in tallies]))
        for layer, seen, tally in zip(self.layers, self.tallies, tallies, strict=True):
            tally.zero_()
            if update:
                layer.router.rebalance(seen[:-1])

    def metrics(self) -> dict[str, float]:
        """Of the last step, over all layers; {} for a model without experts. All ranks call it.

        max_load: tokens of an expert over the mean of its layer, the largest; dead_experts: those without a token;
        router_entropy: nats, mean over tokens and layers.
        """
        if not self.anywhere:
            return {}
        highest = torch.zeros((), dtype=torch.float64)
        sums = torch.zeros(3, dtype=torch.float64)
        for layer, tally in zip(self.layers, self.tallies, strict=True):
            *counts, entropy = tally.tolist()
            tokens = sum(counts) / layer.num_experts_per_tok
            highest = highest.clamp(min=max(counts) * len(counts) / sum(counts))
            sums += torch.tensor([1.0, counts.count(0), entropy / tokens], dtype=torch.float64)
        layers, dead, entropies = self._over_stages(sums).tolist()
        return {
            "moe/max_load": self._over_stages(highest, "max").item(),
            "moe/dead_experts": dead,
            "moe/router_entropy": entropies / layers,
        }

    def _over_stages(self, values: Tensor, op: str = "sum") -> Tensor:
        """Reduced over the stages of a pipeline."""
        if self.mesh.size("pp") == 1:
            return values
        return all_reduce(values.to(self.device), op, self.mesh.group("pp"))
