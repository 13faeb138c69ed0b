"""Gates under an L1 penalty, by proximal steps: exact zeros (He et al. 2017; the channel masks of Liu et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class L1Gates:
    """One gate ``b`` per channel, starting at 1, trained with Adam on the loss and a soft threshold after each step.

    Adam's step is scale-free in the loss, and the threshold ``lr * strength`` acts in the same unit: a gate shrinks unless
    the loss pulls it up in more than a fraction ``strength`` of its steps. The result does not depend on the scale of the
    loss.

    Args:
        trainable: bool, shape [num_channels]; other gates stay at 1.
        lr: Adam's learning rate, constant (a decayed gate rate freezes gates half-way).
        snap_threshold: a gate whose magnitude falls to this or below may be snapped to zero for good.
    """

    def __init__(self, trainable: Tensor, lr: float, snap_threshold: float) -> None:
        self.values = nn.Parameter(torch.ones(trainable.shape[0], device=trainable.device))
        self.trainable = trainable.clone()
        self.dead = torch.zeros_like(trainable)
        self.lr = lr
        self.snap_threshold = snap_threshold
        self.optimizer = torch.optim.Adam([self.values], lr=lr, weight_decay=0.0)

    def multipliers(self) -> Tensor:
        """What each channel is multiplied by, shape [num_channels]."""
        return self.values

    @torch.no_grad()
    def update(self, strength: Tensor) -> None:
        """One step on the accumulated gradient, then the proximal step for ``sum_i strength_i |b_i|``.

        Gates that are dead or not trainable do not move. The gradient is cleared.
        """
        if self.values.grad is None:
            return
        moving = self.trainable & ~self.dead
        before = self.values.detach().clone()
        self.values.grad.mul_(moving)
        self.optimizer.step()
        self.values.grad = None
        shrunk = self.values.sign() * (self.values.abs() - self.lr * strength).clamp_min(0.0)
        self.values.copy_(torch.where(moving, shrunk, before))

    @torch.no_grad()
    def snap(self, channels: Tensor) -> None:
        """Set the gates of ``channels`` (int64 ids) to zero and freeze them."""
        self.dead[channels] = True
        self.values[channels] = 0.0

    def candidates(self) -> Tensor:
        """Ids of live trainable gates at or below the threshold, smallest first."""
        magnitude = self.values.detach().abs()
        small = self.trainable & ~self.dead & (magnitude <= self.snap_threshold)
        ids = small.nonzero().squeeze(1)
        return ids[torch.argsort(magnitude[ids], stable=True)]

    def saliency(self) -> Tensor:
        """``|b|``, shape [num_channels]."""
        return self.values.detach().abs()

    def state_dict(self) -> dict[str, Any]:
        """Gates, dead flags and optimizer state."""
        return {
            "values": self.values.detach().cpu().clone(),
            "dead": self.dead.cpu().clone(),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.values.copy_(state["values"])
        self.dead.copy_(state["dead"])
        self.optimizer.load_state_dict(state["optimizer"])
