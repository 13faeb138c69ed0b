"""Sums behind convolutions that broadcast at other batch sizes than the example's: with a position embedding, say."""

from __future__ import annotations

from torch import Tensor

from ..nn import CompactConv2d
from ..ops import ACTIVATIONS
from ..ops._library import output_shape


def same_kind(y: Tensor, residual: Tensor) -> bool:
    """Whether a residual can be added in place."""
    return y.shape == residual.shape and y.dtype == residual.dtype


class SummingConv2d(CompactConv2d):
    """The same in the place of a convolution and the sum behind it, which takes whatever torch's sum does.

    The sum is fused where both sides have the same shape, as they had when it was found; otherwise it is an ordinary one.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x) + residual)``.

        Args:
            x: shape (N, C, H, W).
            residual: of a shape that broadcasts with the convolution's, or None.
        """
        if residual is None or x.dim() != 4 or self._fits(x, residual):
            return super().forward(x, residual)
        return self._summed(x, residual)

    def _fits(self, x: Tensor, residual: Tensor) -> bool:
        expected = output_shape(x, self.weight_shape, self.stride, self.padding, self.dilation)
        return tuple(residual.shape) == expected and residual.dtype == x.dtype

    def _summed(self, x: Tensor, residual: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self._own(x, None, "none") + residual)


__all__ = ["SummingConv2d", "same_kind"]
