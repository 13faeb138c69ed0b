"""The vendor's convolution with weights in oneDNN's own layout, as frozen graphs have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn._backend import Layer, Run, prepacked
from ..nn._convert import symmetric_padding
from ..ops._library import output_shape
from .folded import FoldedConv2d


class PrepackedConv2d(FoldedConv2d):
    """The same as :class:`FoldedConv2d`, without arranging the weight anew in every call; residual sum and ReLU are fused.

    For float32 on a CPU, of channels_last maps, without gradients; whatever else comes, and what ``torch.compile`` traces,
    takes the way of :class:`FoldedConv2d`. Parameters stay plain: the module saves, loads, copies and converts like any
    other, and arranges its weight again at the next call. A weight that is changed in place without that is not seen.

    Args:
        conv: with symmetric zero padding; used as it is, not copied.
        activation: a name in ``lightning_prune.ops.ACTIVATIONS``.

    Raises:
        ValueError: another padding.
    """

    _run: Run | None = None

    def __init__(self, conv: nn.Conv2d, activation: str = "none") -> None:
        super().__init__(conv, activation)
        self._padding = symmetric_padding(conv)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x) + residual)``; shapes as in :class:`lightning_prune.nn.CompactConv2d`."""
        if torch.compiler.is_compiling() or not self._takes(x, residual):
            return super().forward(x, residual)
        run = self._run
        if run is None:
            run = self._run = prepacked(self._layer(), x) or super().forward
        return run(x, residual)

    def _takes(self, x: Tensor, residual: Tensor | None) -> bool:
        weight = self.conv.weight
        plain = type(x) is Tensor and x.dtype is weight.dtype is torch.float32 and x.device.type == "cpu"
        if not plain or x.dim() != 4 or x.is_contiguous() or x.numel() == 0 or weight.device.type != "cpu":
            return False
        if residual is not None and tuple(residual.shape) != self._shape_of(x):
            return False  # a sum that broadcasts
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight)):
            return False
        return x.shape[1] == self.conv.in_channels and x.is_contiguous(memory_format=torch.channels_last)

    def _shape_of(self, x: Tensor) -> tuple[int, ...]:
        conv = self.conv
        return output_shape(x, conv.weight.shape, conv.stride, self._padding, conv.dilation)

    def _layer(self) -> Layer:
        conv = self.conv
        bias = None if conv.bias is None else conv.bias.detach()
        settings = (list(conv.stride), list(self._padding), list(conv.dilation), conv.groups, self.activation)
        return Layer(conv.weight.detach(), bias, None, None, *settings, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrepackedConv2d:
        self._run = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._run = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}
