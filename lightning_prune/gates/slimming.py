"""Network slimming (Liu et al. 2017): an L1 penalty on batch norm's scales, by proximal steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..channels.groups import ChannelGraph
from .base import Gates, learned


def _scales(model: nn.Module, graph: ChannelGraph) -> Iterator[tuple[nn.Parameter, slice, Tensor]]:
    """Batch norm weights, the channels of a group they scale, and the position of each channel, shape [size, k]."""
    weights = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.weight is not None
    }
    for group in graph.groups:
        for member in group.members:
            if member.tensor in weights:
                yield weights[member.tensor], group.ids, torch.from_numpy(member.index)


@learned("slimming")
class SlimmingGates(Gates):
    """No gates of its own: the network's batch norm scales are shrunk and ranked. Channels without a norm are kept."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1) -> None:  # fmt: skip
        self._scale = [(w, ids, index.to(trainable.device)) for w, ids, index in _scales(model, graph)]
        if not self._scale:
            raise ValueError(
                "method='slimming' ranks batch norm scales, but no prunable channel passes a batch norm"
            )
        super().__init__(model, graph, trainable, lr, snap_threshold, steps)

    def can_gate(self, model: nn.Module, graph: ChannelGraph) -> Tensor:
        """Channels with a norm."""
        found = torch.zeros(graph.num_channels, dtype=torch.bool)
        for _, ids, _ in self._scale:
            found[ids] = True
        return found

    def attach(self) -> None:
        """Nothing to hang but the masks of resting channels."""
        if self.soft:
            self._hooks.attach(awake=self.awake)

    def saliency(self) -> Tensor:
        """Mean ``|gamma|`` over the norms a channel passes."""
        total = torch.zeros(self.trainable.shape, device=self.trainable.device)
        count = torch.zeros_like(total)
        for weight, ids, index in self._scale:
            total[ids] += weight.detach().abs()[index].mean(dim=1)
            count[ids] += 1
        return total / count.clamp_min(1)

    def presence(self) -> Tensor:
        """Scales on their way out count in part."""
        return torch.where(
            self.dead, 0.0, torch.where(self.trainable, (self.saliency() / 0.5).clamp(0, 1), 1.0)
        )

    def shrink(self, strength: Tensor, moving: Tensor) -> None:
        """Soft threshold of every scale at ``lr * strength``."""
        for weight, ids, index in self._scale:
            cut = (self.lr * strength * moving)[ids][:, None].expand(-1, index.shape[1])
            threshold = torch.zeros_like(weight).index_put_(
                (index.reshape(-1),), cut.reshape(-1).to(weight.dtype)
            )
            weight.copy_(weight.sign() * (weight.abs() - threshold).clamp_min(0.0))
