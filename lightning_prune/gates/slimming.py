"""Network slimming (Liu et al. 2017): an L1 penalty on batch norm's scales, by proximal steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..channels.groups import ChannelGraph
from .base import Gates, learned


class _Scale(NamedTuple):
    """A batch norm's weight, its positions that belong to channels, whose they are, and each one's share in its channel."""

    weight: nn.Parameter
    positions: Tensor
    channels: Tensor
    shares: Tensor


def _scales(model: nn.Module, graph: ChannelGraph, device: torch.device) -> list[_Scale]:
    weights = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.weight is not None
    }
    found = []
    for name in dict.fromkeys(m.tensor for group in graph.groups for m in group.members):
        if name in weights:
            channels = graph.positions(name, 0)
            positions = np.flatnonzero(channels >= 0)
            channels = channels[positions]
            shares = 1.0 / np.bincount(channels, minlength=1)[channels]
            found.append(
                _Scale(
                    weights[name],
                    torch.from_numpy(positions).to(device),
                    torch.from_numpy(channels).to(device),
                    torch.from_numpy(shares).float().to(device),
                )
            )
    return found


@learned("slimming")
class SlimmingGates(Gates):
    """No gates of its own: the network's batch norm scales are shrunk and ranked. Channels without a norm are kept."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1) -> None:  # fmt: skip
        self._model, self._device = model, trainable.device
        self._scales = _scales(model, graph, trainable.device)
        if not self._scales:
            raise ValueError(
                "method='slimming' ranks batch norm scales, but no prunable channel passes a batch norm"
            )
        super().__init__(model, graph, trainable, lr, snap_threshold, steps)

    def can_gate(self, model: nn.Module, graph: ChannelGraph) -> Tensor:
        """Channels with a norm."""
        found = torch.zeros(graph.num_channels, dtype=torch.bool)
        for scale in self._scales:
            found[scale.channels.cpu()] = True
        return found

    def follow(self, graph: ChannelGraph) -> None:
        """The scales of the channels that are left."""
        super().follow(graph)
        self._scales = _scales(self._model, graph, self._device)

    def attach(self) -> None:
        """Nothing to hang but the masks of resting channels."""
        if self.soft:
            self._hooks.attach(awake=self.awake)

    def saliency(self) -> Tensor:
        """Mean ``|gamma|`` over the norms a channel passes."""
        total = torch.zeros(self.trainable.shape, device=self.trainable.device)
        count = torch.zeros_like(total)
        for weight, positions, channels, shares in self._scales:
            total.index_add_(0, channels, weight.detach().abs()[positions].float() * shares)
            count.index_add_(0, channels, shares)
        return total / count.clamp_min(1)

    def presence(self) -> Tensor:
        """Scales on their way out count in part."""
        return torch.where(
            self.dead, 0.0, torch.where(self.trainable, (self.saliency() / 0.5).clamp(0, 1), 1.0)
        )

    def shrink(self, strength: Tensor, moving: Tensor) -> None:
        """Soft threshold of every scale at ``lr * strength``."""
        for weight, positions, channels, _ in self._scales:
            threshold = torch.zeros_like(weight)
            threshold[positions] = (self.lr * strength * moving)[channels].to(weight.dtype)
            weight.copy_(weight.sign() * (weight.abs() - threshold).clamp_min(0.0))
