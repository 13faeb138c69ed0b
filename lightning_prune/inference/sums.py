"""Sums behind convolutions that broadcast at other batch sizes than the example's: with a position embedding, say."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn import CompactConv2d
from ..ops import ACTIVATIONS
from ..ops._library import output_size


def same_kind(y: Tensor, residual: Tensor) -> bool:
    """Whether a residual can be added in place."""
    return y.shape == residual.shape and y.dtype == residual.dtype


class SummingConv2d(CompactConv2d):
    """The same in the place of a convolution and the sum behind it, which takes whatever torch's sum does.

    The sum is fused where both sides have the same shape, as they had when it was found; otherwise it is an ordinary one. The
    operator looks at the shapes anyway, so nothing is asked before it refuses.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x) + residual)``.

        Args:
            x: shape (N, C, H, W).
            residual: of a shape that broadcasts with the convolution's, or None.
        """
        if residual is None:
            return super().forward(x)
        if torch.compiler.is_compiling():  # what is traced does not refuse
            return super().forward(x, residual) if self._fits(x, residual) else self._summed(x, residual)
        try:
            return super().forward(x, residual)
        except (RuntimeError, ValueError):
            if x.dim() != 4 or self._fits(x, residual):
                raise
        return self._summed(x, residual)

    def _fits(self, x: Tensor, residual: Tensor) -> bool:
        settings = zip(
            x.shape[2:], self.weight_shape[2:], self.stride, self.padding, self.dilation, strict=True
        )
        expected = (x.shape[0], self.out_channels, *(output_size(*numbers) for numbers in settings))
        return tuple(residual.shape) == expected and residual.dtype == x.dtype

    def _summed(self, x: Tensor, residual: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self._own(x, None, "none") + residual)


__all__ = ["SummingConv2d", "same_kind"]
