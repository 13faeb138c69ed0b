"""Small networks, one per way in which channels can be tied together. Inputs are ``[N, 3, 16, 16]`` unless said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(i: int, o: int, k: int = 3, **kw: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


def head(i: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 5))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), conv(8, 12), nn.MaxPool2d(2), nn.Dropout(0.3), conv(12, 16))
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.down = nn.Conv2d(i, o, 1, stride, bias=False) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.head = (
            conv(3, 8),
            Block(8, 8),
            Block(8, 12, 2),
            Block(12, 12),
            head(12),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(self.stem(x)))))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1))
            for i in range(3)
        )
        self.head = head(20)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1))


class Depthwise(nn.Module):
    def __init__(self, multiplier: int = 2) -> None:
        super().__init__()
        self.expand = conv(3, 8)
        self.depthwise = conv(8, 8 * multiplier, groups=8)
        self.project = nn.Conv2d(8 * multiplier, 6, 1)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.project(self.depthwise(self.expand(x))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 12), conv(12, 24, groups=4), conv(24, 8), head(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Transposed(nn.Module):
    """Encoder and decoder with a skip connection; returns an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 12, stride=2)
        self.up = nn.ConvTranspose2d(12, 10, 2, 2)
        self.grouped_up = nn.ConvTranspose2d(12, 6, 2, 2, groups=2)
        self.out = nn.Conv2d(8 + 10 + 6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        return self.out(torch.cat([a, self.up(b), self.grouped_up(b)], 1))


class FlattenLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 6, stride=4), conv(6, 8))
        self.fc1, self.slope, self.fc2 = nn.Linear(8 * 16, 10), nn.PReLU(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.slope(self.fc1(self.features(x).flatten(1))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 12)
        self.reduce, self.expand, self.head = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1), head(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.head(y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True))))))


class Shuffle(nn.Module):
    """ShuffleNet: half the channels pass, the halves are interleaved by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.last, self.head = conv(3, 12), conv(6, 6), conv(12, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            a, b = x.chunk(2, 1)
            x = torch.cat([a, self.branch(b)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.last(x))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = (
            conv(3, 8),
            nn.Sequential(nn.Conv2d(8, 24, 1), nn.PixelShuffle(2)),
            conv(6, 6),
        )
        self.down, self.out = nn.PixelUnshuffle(2), nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.b(self.up(self.a(x)))))


class Tied(nn.Module):
    """One weight in two places: as a module's, and transposed through ``F.linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.encode, self.twin = nn.Linear(8, 6), nn.Linear(8, 6)
        self.twin.weight = self.encode.weight
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        y = torch.tanh(self.encode(x)) + torch.tanh(self.twin(x))
        return self.out(x + F.linear(y, self.encode.weight.t()))


class PadShortcut(nn.Module):
    """Residual whose shortcut is padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))


class SpaceToDepth(nn.Module):
    """YOLO's Focus: four shifted copies side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(24, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        parts = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.head(self.b(torch.cat(parts, 1)))


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.b, self.head = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


class OwnParameters(nn.Module):
    """Layer scale, a positional map and a functional convolution with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), head(8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.position = nn.Parameter(torch.rand(1, 8, 16, 16))
        self.kernel = nn.Parameter(torch.rand(8, 8, 1, 1))
        self.register_buffer("shift", torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.scale * F.conv2d(x + self.position, self.kernel) + self.shift)


class OneDimensional(nn.Module):
    """``[N, 3, 16, 16]`` read as a sequence and as a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3))
        self.vol = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 1))
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.seq(x.flatten(2)).mean(2)
        b = self.vol(x.unflatten(3, (4, 4))).mean((2, 3, 4))
        return self.out(a * b)


class Branching(nn.Module):
    """Control flow that depends on the data and on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x) if x.sum() > 0 and x.shape[-1] > 4 else self.c(x)
        return self.head(x)


@dataclass
class Output:
    boxes: Tensor
    scores: Tensor


class Detector(nn.Module):
    """Two inputs, a nested output with a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth, self.neck = conv(3, 8), conv(1, 8), conv(8, 10)
        self.boxes, self.scores = nn.Conv2d(10, 4, 1), nn.Conv2d(10, 2, 1)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, object]:
        x = self.neck(self.image(image) + self.depth(depth))
        return {
            "first": Output(self.boxes(x), self.scores(x).sigmoid()),
            "all": (self.boxes(x).mean((2, 3)), [x.shape[0]]),
        }


class HardCoded(nn.Module):
    """A size that is neither an attribute nor visible in any tensor: a comparison in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[1] != 8:
            raise ValueError(f"expected 8 channels, got {x.shape[1]}")
        return self.head(self.b(x))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    c.__name__: c
    for c in (
        Plain, Residual, Dense, Depthwise, Grouped, Transposed, FlattenLinear, SqueezeExcite, Shuffle, PixelShuffle,
        Tied, PadShortcut, SpaceToDepth, WeightNorm, OwnParameters, OneDimensional, Branching,
    )
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A network with batch norm statistics and affine parameters that are not trivially 0 and 1."""
    model = NETWORKS[name]()
    return randomize(model)


def randomize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def image(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size)
