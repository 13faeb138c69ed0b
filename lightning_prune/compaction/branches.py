"""Branches that lost all their channels: their layers vanish, and what they still add is a constant."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Geometry:
    """Where a convolution looks; enough to know the size of its output."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    output_padding: tuple[int, ...]
    transposed: bool

    @classmethod
    def of(cls, conv: _ConvNd) -> Geometry:
        """The geometry of ``conv``."""
        return cls(
            conv.kernel_size, conv.stride, conv.dilation, conv.padding, conv.output_padding, conv.transposed
        )

    def output_size(self, x: Tensor) -> list[int]:
        """Spatial size of the output for an input ``[N, C, ...]``, by the documented formulas."""
        sizes = []
        for i, n in enumerate(x.shape[2:]):
            reach = self.dilation[i] * (self.kernel_size[i] - 1)
            same = reach if self.padding == "same" else 0
            padded = same if isinstance(self.padding, str) else 2 * self.padding[i]
            if self.transposed:
                sizes.append((n - 1) * self.stride[i] - padded + reach + self.output_padding[i] + 1)
            else:
                sizes.append((n + padded - reach - 1) // self.stride[i] + 1)
        return sizes


class NoChannels(nn.Module):
    """Stands in for a convolution without output channels: an empty map of the right size, nothing computed."""

    def __init__(self, conv: _ConvNd) -> None:
        super().__init__()
        self.geometry = Geometry.of(conv)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, ...] -> [N, 0, ...]``."""
        return x.new_empty((x.shape[0], 0, *self.geometry.output_size(x)))


class Constant(nn.Module):
    """Stands in for a convolution without input channels: its bias everywhere."""

    def __init__(self, conv: _ConvNd) -> None:
        super().__init__()
        self.geometry = Geometry.of(conv)
        self.out_channels = conv.out_channels
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 0, ...] -> [N, out_channels, ...]``."""
        size = (x.shape[0], self.out_channels, *self.geometry.output_size(x))
        zeros = x.new_zeros(size)
        return zeros if self.bias is None else zeros + self.bias.view(1, -1, *[1] * (len(size) - 2))


def remove_empty_layers(model: nn.Module) -> list[str]:
    """Replace, in place, every layer that has no channels left; returns the names of the replaced modules."""
    replaced = []
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.numel():
            vector = getattr(module, "running_mean", None)
            if not (isinstance(module, _NormBase) and isinstance(vector, Tensor) and not vector.numel()):
                continue
        if isinstance(module, _ConvNd):
            gone = module.out_channels == 0
            substitute: nn.Module = NoChannels(module) if gone else Constant(module)
        elif isinstance(module, (_NormBase, nn.PReLU)):
            substitute = nn.Identity()
        else:
            continue  # a linear layer computes nothing without channels, by itself
        substitute.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, substitute)
        replaced.append(name)
    return replaced
