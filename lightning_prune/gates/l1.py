"""Gates under an L1 penalty, by proximal steps: exact zeros (He et al. 2017; the channel masks of Liu et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Gates, learned


@learned("l1")
class L1Gates(Gates):
    """One gate ``b`` per channel, starting at 1, trained with Adam on the loss and a soft threshold after each step.

    Adam's step is scale-free in the loss, and the threshold ``lr * strength`` acts in the same unit: a gate shrinks unless
    the loss pulls it up in more than a fraction ``strength`` of its steps.
    """

    def build(self) -> dict[str, nn.Parameter]:
        """The gates themselves."""
        self.values = nn.Parameter(torch.ones(self.trainable.shape[0], device=self.trainable.device))
        return {"values": self.values}

    def multipliers(self, training: bool = True) -> Tensor:
        """``b``."""
        return self.values

    def saliency(self) -> Tensor:
        """``|b|``."""
        return self.values.detach().abs()

    def presence(self) -> Tensor:
        """Gates on their way out count in part, or the controller would overshoot by everything in flight."""
        return torch.where(self.dead, 0.0, (self.saliency() / 0.5).clamp(0.0, 1.0))

    def shrink(self, strength: Tensor, moving: Tensor) -> None:
        """The proximal step of ``strength_i |b_i|``: soft threshold at ``lr * strength_i``."""
        magnitude = (self.values.abs() - self.lr * strength).clamp_min(0.0)
        self.values.copy_(self.values.sign() * magnitude)

    def zero(self, channels: Tensor) -> None:
        """``b = 0``."""
        self.values[channels] = 0.0
