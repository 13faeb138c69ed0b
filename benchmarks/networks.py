"""Four classifiers at 224x224 and what pruning makes of them: about half of every group's channels, ragged or rounded to 8.

Written out here so that the numbers do not depend on another package's version. Weights are random and batch norm
statistics calibrated, which is all that a measurement of time and of rounding errors needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune import CompactionPlan, compact, mask_channels, trace_channels


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """A residual block of either ResNet, or MobileNetV2's (no activation behind the sum)."""

    def __init__(self, body: list[nn.Module], shortcut: list[nn.Module] | None, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = None if shortcut is None else nn.Sequential(*shortcut)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """``last(body(x) + shortcut(x))``."""
        y: Tensor = self.last(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))
        return y


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def _resnet(depths: tuple[int, ...], expansion: int) -> nn.Module:
    layers = [*_conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for stage, depth in enumerate(depths):
        inner, outer = 64 << stage, (64 << stage) * expansion
        for number in range(depth):
            stride = 2 if stage > 0 and number == 0 else 1
            if expansion == 1:
                body = [
                    *_conv_norm(width, inner, 3, stride),
                    nn.ReLU(inplace=True),
                    *_conv_norm(inner, outer, 3),
                ]
            else:
                body = [*_conv_norm(width, inner, 1), nn.ReLU(inplace=True)]
                body += [
                    *_conv_norm(inner, inner, 3, stride),
                    nn.ReLU(inplace=True),
                    *_conv_norm(inner, outer, 1),
                ]
            shortcut = None if stride == 1 and width == outer else _conv_norm(width, outer, 1, stride)
            layers.append(Block(body, shortcut, nn.ReLU(inplace=True)))
            width = outer
    return nn.Sequential(*layers, *_head(width))


def resnet18() -> nn.Module:
    """He et al. 2016."""
    return _resnet((2, 2, 2, 2), 1)


def resnet50() -> nn.Module:
    """He et al. 2016, stride in the 3x3 convolution."""
    return _resnet((3, 4, 6, 3), 4)


def vgg16_bn() -> nn.Module:
    """Simonyan & Zisserman 2015, configuration D, with batch norm."""
    layers: list[nn.Module] = []
    width = 3
    for outputs, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [
                nn.Conv2d(width, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
            width = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Linear(512 * 49, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
    ]
    return nn.Sequential(
        *layers, nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, 1000)
    )


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018."""
    layers = [*_conv_norm(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    width = 32
    stages = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip
    for expansion, outputs, depth, first in stages:
        for number in range(depth):
            stride, inner = first if number == 0 else 1, width * expansion
            body: list[nn.Module] = []
            if expansion > 1:
                body = [*_conv_norm(width, inner, 1), nn.ReLU6(inplace=True)]
            body += [*_conv_norm(inner, inner, 3, stride, inner), nn.ReLU6(inplace=True)]
            body += _conv_norm(inner, outputs, 1)
            residual = stride == 1 and width == outputs
            layers.append(Block(body, None, nn.Identity()) if residual else nn.Sequential(*body))
            width = outputs
    layers += [*_conv_norm(width, 1280, 1), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, *_head(1280))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "VGG-16-BN": vgg16_bn,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
}


@dataclass(frozen=True)
class Pruned:
    """A network before and after pruning; ``padded`` computes the same as ``ragged``, with zeros up to multiples of 8."""

    dense: nn.Module
    ragged: nn.Module
    padded: nn.Module
    rounded: nn.Module


def _randomise(model: nn.Module, size: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if module.groups == 1 else "fan_in")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.momentum = None  # the plain average over all batches
    with torch.no_grad():
        model.train()(torch.randn(2, 3, size, size))


def prune(name: str, seed: int = 0, size: int = 64) -> Pruned:
    """Build a network and take 40 to 60 % of every group's channels away, residual streams included.

    Traced, calibrated and verified on a smaller image than the one that is timed: the networks take any.
    """
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    _randomise(model, size)
    model.eval()
    x = torch.randn(1, 3, size, size)
    graph = trace_channels(model, x)
    random = np.random.default_rng(seed)
    ragged, padded, rounded = (np.zeros(graph.num_channels, dtype=bool) for _ in range(3))
    for group in graph.groups:
        order = group.start + random.permutation(group.size)
        live = max(1, round(group.size * random.uniform(0.4, 0.6)))
        ragged[order[:live]] = True
        padded[order[: min(group.size, -(-live // 8) * 8)]] = True
        rounded[order[: min(group.size, max(8, round(live / 8) * 8))]] = True
    plans = [CompactionPlan.from_mask(graph, mask) for mask in (ragged, padded, rounded)]
    zeroed = mask_channels(model, x, plans[0])
    return Pruned(
        model, compact(model, x, plans[0]), compact(zeroed, x, plans[1]), compact(model, x, plans[2])
    )
