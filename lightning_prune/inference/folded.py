"""The vendor's convolution with what follows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import ACTIVATIONS
from .in_place import IN_PLACE
from .sums import same_kind


class FoldedConv2d(nn.Module):
    """The vendor's convolution with a folded norm, then the residual add and the activation in place.

    Args:
        conv: used as it is, not copied.
        activation: a name in ``lightning_prune.ops.ACTIVATIONS``.
    """

    def __init__(self, conv: nn.Conv2d, activation: str = "none") -> None:
        super().__init__()
        self.conv = conv
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x) + residual)``; shapes as in :class:`lightning_prune.nn.CompactConv2d`."""
        y: Tensor = self.conv(x)
        differentiable = torch.is_grad_enabled() and y.requires_grad
        if residual is not None:
            in_place = not differentiable and same_kind(y, residual)
            y = y.add_(residual) if in_place else y + residual
        if differentiable or self.activation not in IN_PLACE:
            return ACTIVATIONS[self.activation](y)
        return IN_PLACE[self.activation](y)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation}"
