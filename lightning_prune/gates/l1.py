"""Gates under an L1 penalty, by proximal steps: exact zeros (He et al. 2017; the channel masks of Liu et al. 2017)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Gates, learned
from .optim import SharedScaleAdam


@learned("l1")
class L1Gates(Gates):
    """One gate ``b`` per channel, starting at 1, stepped on the loss and soft-thresholded after each step.

    Steps are measured in the root mean square of all gates' gradients (:class:`~lightning_prune.gates.optim.SharedScaleAdam`):
    free of the loss's scale, yet a gate that matters ten times as much resists a ten times higher price. The threshold
    ``lr * strength`` acts in the same unit, so that a gate shrinks where ``|dL/db|`` is below ``strength`` times that mean.
    """

    price_exponent: ClassVar[float] = 1.0
    #: least magnitude with which a channel that stays is folded into the weights
    least_folded: ClassVar[float] = 0.25

    def build(self) -> dict[str, nn.Parameter]:
        """The gates themselves."""
        self.values = nn.Parameter(torch.ones(self.trainable.shape[0], device=self.trainable.device))
        return {"values": self.values}

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """One scale for all gates, so that their gradients remain comparable."""
        return SharedScaleAdam(parameters, lr=self.lr)

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

    def final(self) -> Tensor:
        """``b``, but with a magnitude of at least ``least_folded`` where a channel stays.

        What the penalty shrank and the budget kept would start finetuning as good as dead, its gradients being as small as
        its gate (the bias that the relaxed lasso takes back, Meinshausen 2007).
        """
        values = self.values.detach()
        sign = torch.where(values < 0, -1.0, 1.0)
        kept = self.trainable & ~self.dead
        return torch.where(kept, sign * values.abs().clamp_min(self.least_folded), values)
