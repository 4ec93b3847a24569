"""How well indexers foresee attention, over the whole job: measured every step.

Their losses count in backward (models/blocks/sparse_core.py); the counts of all ranks that saw other tokens are added
up. Tensor ranks each count their share of the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovl.dist import all_reduce
from nanovl.mesh import Mesh
from nanovl.models.blocks.sparse_core import index_losses


class IndexLosses:
    """The losses of a model's indexers, or of a part's. All ranks call begin_step and end_step around every step."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.losses, self.mesh = index_losses(model), mesh
        self.device = next(model.parameters()).device
        layers = torch.tensor(float(len(self.losses)), dtype=torch.float64)
        self.anywhere = self._over_stages(layers).item() > 0
        self.of_layers: Tensor = torch.zeros(0, dtype=torch.float64)
        """Of the last step: mean over tokens, nats, for each layer."""

    def begin_step(self, tokens: int) -> None:
        """`tokens` of all ranks and micro-batches: what the losses are means over."""
        for loss in self.losses:
            loss.step_tokens = tokens

    @torch.no_grad()
    def end_step(self) -> None:
        """Add up what all ranks counted since the last call."""
        if not self.losses:
            return
        total = torch.stack([loss.tally for loss in self.losses])
        for axis in ("loss", "tp"):
            if self.mesh.size(axis) > 1:
                all_reduce(total, group=self.mesh.group(axis))
        self.of_layers = total[:, 0] / total[:, 1]
        for loss in self.losses:
            loss.tally.zero_()

    def metrics(self) -> dict[str, float]:
        """Of the last step; {} for a model without such losses. All ranks call it.

        kl: nats, mean over tokens and layers; kl_max: that of the worst layer.
        """
        if not self.anywhere:
            return {}
        here = self.of_layers.cpu()
        sums = torch.stack((torch.tensor(float(len(here)), dtype=torch.float64), here.sum()))
        highest = here.max() if len(here) else torch.zeros((), dtype=torch.float64)
        layers, total = self._over_stages(sums).tolist()
        return {"indexer/kl": total / layers, "indexer/kl_max": self._over_stages(highest, "max").item()}

    def _over_stages(self, values: Tensor, op: str = "sum") -> Tensor:
        """Reduced over the stages of a pipeline."""
        if self.mesh.size("pp") == 1:
            return values
        return all_reduce(values.to(self.device), op, self.mesh.group("pp"))
