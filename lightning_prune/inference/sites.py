"""A convolution with what can be fused into it, and the modules that can take its place."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import nn

from ..nn import CompactConv2d
from ..nn._convert import symmetric_padding
from ..nn.compact_conv2d import _fold_batch_norm
from ..ops.winograd import algorithm_for
from .folded import FoldedConv2d
from .padded import PaddedConv2d
from .prepacked import PrepackedConv2d
from .sums import SummingConv2d


@dataclass(frozen=True)
class ConvSite:
    """One convolution of a network and what follows it.

    Attributes:
        name: qualified name of the convolution.
        conv: in evaluation mode; not changed.
        norm: to be folded, or None.
        activation: name of the fused activation, "none" without one.
        residual: whether another tensor is added before the activation: in the example run it had the output's shape.
        shape: of the input in the example run, (N, C, H, W).
        exact: our kernel sums directly, by no algorithm that trades rounding errors for multiplications.
    """

    name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    activation: str
    residual: bool
    shape: tuple[int, ...]
    exact: bool = False
    _packed: dict[torch.dtype, int | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def folded(self) -> nn.Conv2d:
        """A copy of the convolution with the norm folded in."""
        conv = copy.deepcopy(self.conv)
        if self.norm is not None:
            with torch.no_grad():
                weight, bias = _fold_batch_norm(conv.weight, conv.bias, self.norm)
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return conv.requires_grad_(False)

    def vendor(self) -> FoldedConv2d:
        """The module that runs torch's convolution."""
        return FoldedConv2d(self.folded(), self.activation).eval()

    def padded(self) -> PaddedConv2d | None:
        """The module that runs torch's convolution at multiples of 8 channels; None where it has such or cannot be padded."""
        conv = self.conv
        fits = conv.groups == 1 and conv.padding_mode == "zeros" and any(n % 8 for n in conv.weight.shape[:2])
        return PaddedConv2d(self.folded(), self.activation).eval() if fits else None

    def prepacked(self) -> PrepackedConv2d | None:
        """The module that runs oneDNN's convolution with weights in its own layout; None for paddings it does not know."""
        return PrepackedConv2d(self.folded(), self.activation).eval() if self.prepackable else None

    @property
    def prepackable(self) -> bool:
        """Whether oneDNN knows the padding."""
        try:
            symmetric_padding(self.conv)
        except ValueError:
            return False
        return True

    def own(self) -> CompactConv2d | None:
        """The module that runs this package's convolution; None where it cannot (reflecting padding)."""
        images, _, height, width = self.shape
        conv = self.folded()
        strides = cast(tuple[int, int], conv.stride)
        algorithm = None
        if not self.exact and strides[0] == strides[1] and strides[0] in (1, 2):
            # The output is about as large as the input over the stride.
            out = (-(-height // strides[0]), -(-width // strides[0]))
            known = algorithm_for(conv.weight.shape, images, *out, strides[0])
            algorithm = None if known == "auto" else known
        module = SummingConv2d if self.residual else CompactConv2d
        try:
            return module.from_conv(
                conv, None, self.activation, exact=self.exact, backend="own", algorithm=algorithm
            )
        except ValueError:
            return None

    def packed_elements(self, dtype: torch.dtype) -> int | None:
        """Elements of our packed weight in a dtype, which say what it is packed for; None where there is no such module."""
        if dtype not in self._packed:
            own = self.own()
            self._packed[dtype] = None if own is None else own.to(dtype).packed.numel()
        return self._packed[dtype]


class Blueprint(Protocol):
    """A network whose convolution sites are known."""

    @property
    def sites(self) -> list[ConvSite]:
        """In order of execution."""
        ...

    def build(self, modules: list[nn.Module]) -> nn.Module:
        """A network with ``modules[i]`` in place of ``sites[i]`` and what is fused into it; shares the other weights."""
        ...


def foldable(norm: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics and nothing hung on it."""
    return type(norm) is nn.BatchNorm2d and norm.running_mean is not None and plain(norm)


def plain(module: nn.Module) -> bool:
    """Whether nothing is hung on a module: no hooks, no forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def fusable(module: nn.Module) -> bool:
    """Whether a module is exactly torch's convolution."""
    return type(module) is nn.Conv2d and plain(module)


__all__ = ["Blueprint", "ConvSite", "foldable", "fusable", "plain"]
