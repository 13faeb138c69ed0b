"""The networks of the training benchmarks, each at any widths, and which of their channels are dead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from lightning_prune.channels.groups import ChannelGraph, Mask
from lightning_prune.models import resnet20

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16(widths: Sequence[int] = VGG16) -> nn.Module:
    """VGG-16 with batch norm for 32x32 images (13 convolutions, one dense layer); 0 in ``widths`` is a pooling."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in widths:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, 10))


class _Block(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, table 1) with its ImageNet stem; ``width`` channels in the first stage."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks, inputs = [], width
        for stage in range(4):
            for index in range(2):
                outputs = width << stage
                blocks.append(_Block(inputs, outputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(out.mean((2, 3)))


#: name -> (constructor, edge length of the images)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 32),
    "vgg16": (vgg16, 32),
    "resnet18": (ResNet18, 64),
}


def random_mask(graph: ChannelGraph, share: float, seed: int, multiple: int = 1) -> Mask:
    """The same share of every group, at random; at least one channel of each stays, if possible a ``multiple``."""
    generator = np.random.default_rng(seed)
    mask = np.ones(graph.num_channels, dtype=bool)
    for group in graph.groups:
        dead = min(group.size - 1, round(share * group.size))
        spare = -(group.size - dead) % multiple
        dead -= spare if spare <= dead else 0
        mask[group.start + generator.choice(group.size, dead, replace=False)] = False
    return mask
