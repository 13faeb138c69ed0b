"""The vendor's convolution at a multiple of 8 channels, over maps that have that room already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import ACTIVATIONS
from ..ops.tensor_cores import room_of
from .in_place import IN_PLACE
from .sums import same_kind


class PaddedConv2d(nn.Module):
    """A convolution whose channels and outputs are filled up with zeros to multiples of 8, then residual add and activation.

    The vendor's kernels for tensor cores want such numbers. The output has room behind its channels, which the next layer of
    this kind, or ours, reads in place; other inputs are copied once. :class:`FoldedConv2d` is the same without padding.

    Args:
        conv: folded, without groups; not changed.
        activation: a name in ``lightning_prune.ops.ACTIVATIONS``.
    """

    def __init__(self, conv: nn.Conv2d, activation: str = "none") -> None:
        super().__init__()
        self.outputs, self.activation = conv.out_channels, activation
        wide = [-(-n // 8) * 8 for n in (conv.in_channels, conv.out_channels)]
        self.conv = nn.utils.skip_init(
            nn.Conv2d, *wide, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=conv.bias is not None,
            device=conv.weight.device, dtype=conv.weight.dtype,
        ).requires_grad_(False)  # fmt: skip
        with torch.no_grad():
            for target, source in ((self.conv.weight, conv.weight), (self.conv.bias, conv.bias)):
                if target is not None and source is not None:
                    target.zero_()
                    target[tuple(slice(n) for n in source.shape)] = source

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x) + residual)``; shapes as in :class:`lightning_prune.nn.CompactConv2d`."""
        wide: Tensor = self.conv(room_of(x))
        y = wide[:, : self.outputs]
        apart = residual is not None and not same_kind(y, residual)
        if apart or (torch.is_grad_enabled() and y.requires_grad) or self.activation not in IN_PLACE:
            return ACTIVATIONS[self.activation](y if residual is None else y + residual)
        if residual is not None:
            y.add_(residual)
        IN_PLACE[self.activation](wide)  # of the room too: what is behind the channels stays finite
        return y

    def extra_repr(self) -> str:
        """Outputs without padding, and the activation."""
        return f"outputs={self.outputs}, activation={self.activation}"
