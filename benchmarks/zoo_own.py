"""What timm has not: segmenters, detectors, generators, 1-D and 3-D networks, several inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cbr(i: int, o: int, k: int = 3, s: int = 1, **kw: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.SiLU())


class UNet(nn.Module):
    def __init__(self, width: int = 16, transposed: bool = True) -> None:
        super().__init__()
        w = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(
            nn.Sequential(cbr(i, o), cbr(o, o)) for i, o in zip([3, *w], w, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 2, 2)
            if transposed
            else nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 1))
            for i, o in zip(w[:0:-1], w[-2::-1], strict=True)
        )
        self.merge = nn.ModuleList(nn.Sequential(cbr(2 * o, o), cbr(o, o)) for o in w[-2::-1])
        self.out = nn.Conv2d(w[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.out(x)


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = cbr(c, c), cbr(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class C2f(nn.Module):
    """One half passes, the other goes through bottlenecks, everything is joined."""

    def __init__(self, i: int, o: int, n: int = 2) -> None:
        super().__init__()
        self.c = o // 2
        self.first, self.last = cbr(i, 2 * self.c, 1), cbr((2 + n) * self.c, o, 1)
        self.blocks = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).split((self.c, self.c), 1))
        y.extend(block(y[-1]) for block in self.blocks)
        return self.last(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = cbr(c, c // 2, 1), cbr(c * 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.max_pool2d(x, 5, 1, 2)
        z = F.max_pool2d(y, 5, 1, 2)
        return self.b(torch.cat([x, y, z, F.max_pool2d(z, 5, 1, 2)], 1))


class Detect(nn.Module):
    """Anchor-free head with distribution-focal boxes."""

    def __init__(self, channels: list[int], classes: int = 7, bins: int = 8) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.box = nn.ModuleList(
            nn.Sequential(cbr(c, 32), cbr(32, 32), nn.Conv2d(32, 4 * bins, 1)) for c in channels
        )
        self.cls = nn.ModuleList(nn.Sequential(cbr(c, 32), nn.Conv2d(32, classes, 1)) for c in channels)
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        maps = [torch.cat([b(f), c(f)], 1) for f, b, c in zip(features, self.box, self.cls, strict=True)]
        flat = torch.cat([m.view(m.shape[0], 4 * self.bins + self.classes, -1) for m in maps], 2)
        box, cls = flat.split((4 * self.bins, self.classes), 1)
        n, _, a = box.shape
        box = self.dfl(box.view(n, 4, self.bins, a).transpose(2, 1).softmax(1)).view(n, 4, a)
        return torch.cat([box, cls.sigmoid()], 1), maps


class YOLO(nn.Module):
    def __init__(self, w: int = 16) -> None:
        super().__init__()
        self.stem = cbr(12, w)
        self.s1 = nn.Sequential(cbr(w, 2 * w, 3, 2), C2f(2 * w, 2 * w))
        self.s2 = nn.Sequential(cbr(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w))
        self.s3 = nn.Sequential(cbr(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w), SPPF(8 * w))
        self.n2, self.n1 = C2f(12 * w, 4 * w), C2f(6 * w, 2 * w)
        self.d1, self.m2 = cbr(2 * w, 2 * w, 3, 2), C2f(6 * w, 4 * w)
        self.head = Detect([2 * w, 4 * w, 8 * w])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        a = self.s1(self.stem(x))
        b = self.s2(a)
        c = self.s3(b)
        up = F.interpolate
        n2 = self.n2(torch.cat([up(c, scale_factor=2.0), b], 1))
        n1 = self.n1(torch.cat([up(n2, scale_factor=2.0), a], 1))
        return self.head([n1, self.m2(torch.cat([self.d1(n1), n2], 1)), c])


class FPN(nn.Module):
    def __init__(self, w: int = 16) -> None:
        super().__init__()
        widths = [w, 2 * w, 4 * w]
        self.stages = nn.ModuleList(cbr(i, o, 3, 2) for i, o in zip([3, *widths], widths, strict=False))
        self.lateral = nn.ModuleList(nn.Conv2d(c, 32, 1) for c in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in widths)
        self.cls, self.box = (
            nn.Sequential(cbr(32, 32), nn.Conv2d(32, 6, 1)),
            nn.Sequential(cbr(32, 32), nn.Conv2d(32, 4, 1)),
        )

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        top, levels = None, []
        for lateral, feature in zip(list(self.lateral)[::-1], features[::-1], strict=True):
            y = lateral(feature)
            top = y if top is None else y + F.interpolate(top, size=y.shape[-2:])
            levels.append(top)
        levels = [s(level) for s, level in zip(self.smooth, levels, strict=True)]
        return {"cls": [self.cls(v) for v in levels], "box": [self.box(v) for v in levels]}


class ASPP(nn.Module):
    """DeepLab's head on a small backbone."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.backbone = nn.Sequential(cbr(3, 16, 3, 2), cbr(16, c, 3, 2))
        self.one = cbr(c, 24, 1)
        self.dilated = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 24, 3, padding=d, dilation=d), nn.BatchNorm2d(24), nn.ReLU())
            for d in (2, 4)
        )
        self.pool, self.project, self.out = cbr(c, 24, 1), cbr(96, 32, 1), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.backbone(x)
        g = F.interpolate(
            self.pool(F.adaptive_avg_pool2d(f, 1)), size=f.shape[-2:], mode="bilinear", align_corners=False
        )
        y = self.project(torch.cat([self.one(f), *[d(f) for d in self.dilated], g], 1))
        return F.interpolate(self.out(y), size=x.shape[-2:], mode="bilinear", align_corners=False)


class SuperResolution(nn.Module):
    def __init__(self, w: int = 24) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(3, w, 3, padding=1), nn.Sequential(*[EDSRBlock(w) for _ in range(3)])
        self.tail = nn.Sequential(
            nn.Conv2d(w, 4 * w, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(w, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        return self.tail(y + self.body(y))


class EDSRBlock(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, w, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.b(F.relu(self.a(x)))


class Generator(nn.Module):
    """DCGAN: a vector becomes an image."""

    def __init__(self, z: int = 32, w: int = 16) -> None:
        super().__init__()
        self.w = w
        self.fc = nn.Linear(z, 4 * w * 16)
        self.net = nn.Sequential(
            nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1), nn.BatchNorm2d(w), nn.ReLU(),
            nn.ConvTranspose2d(w, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.net(self.fc(z).view(-1, 4 * self.w, 4, 4))


class ShuffleUnit(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, o // 2
        if stride > 1:
            self.short = nn.Sequential(
                nn.Conv2d(i, i, 3, stride, 1, groups=i), nn.BatchNorm2d(i), cbr(i, half, 1)
            )
        c = i if stride > 1 else half
        self.main = nn.Sequential(
            cbr(c, half, 1),
            nn.Conv2d(half, half, 3, stride, 1, groups=half),
            nn.BatchNorm2d(half),
            cbr(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            a, b = x.chunk(2, 1)
            y = torch.cat([a, self.main(b)], 1)
        else:
            y = torch.cat([self.short(x), self.main(x)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def shufflenet_v2() -> nn.Module:
    units, i = [], 24
    for o in (48, 96):
        units += [ShuffleUnit(i, o, 2), ShuffleUnit(o, o, 1), ShuffleUnit(o, o, 1)]
        i = o
    return nn.Sequential(
        cbr(3, 24, 3, 2), *units, cbr(96, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


class ShuffleV1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 24, 3, 2)
        self.a, self.shuffle = nn.Conv2d(24, 24, 1, groups=3), nn.ChannelShuffle(3)
        self.b, self.c = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 24, 1, groups=3)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.c(self.b(self.shuffle(F.relu(self.a(x))))))
        return self.head(x.mean((2, 3)))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 12, 3, padding=1), nn.Conv3d(12, 12, 3, padding=1)
        self.n, self.m, self.out = nn.BatchNorm3d(12), nn.BatchNorm3d(12), nn.Conv3d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n(self.a(x)))
        return self.out(F.relu(x + self.m(self.b(x))))


class TCN(nn.Module):
    """Dilated causal convolutions with weight norm."""

    def __init__(self, w: int = 24) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.convs = nn.ModuleList(norm(nn.Conv1d(2 if i == 0 else w, w, 3, dilation=2**i)) for i in range(4))
        self.skip, self.head = nn.Conv1d(2, w, 1), nn.Linear(w, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, conv in enumerate(self.convs):
            z = F.relu(conv(F.pad(y, (2 * 2**i, 0))))
            y = z + (self.skip(x) if i == 0 else y)
        return self.head(y[..., -1])


class WaveNet(nn.Module):
    """Gated activation units: tanh of one half times sigmoid of the other."""

    def __init__(self, w: int = 16) -> None:
        super().__init__()
        self.inp = nn.Conv1d(1, w, 1)
        self.gates = nn.ModuleList(nn.Conv1d(w, 2 * w, 2, dilation=2**i) for i in range(4))
        self.res, self.skip = (
            nn.ModuleList(nn.Conv1d(w, w, 1) for _ in range(4)),
            nn.ModuleList(nn.Conv1d(w, 20, 1) for _ in range(4)),
        )
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(20, 20, 1), nn.ReLU(), nn.Conv1d(20, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inp(x), 0
        for gate, res, skip in zip(self.gates, self.res, self.skip, strict=True):
            a, b = gate(x).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            s = skip(y)
            total = s + (total[..., -s.shape[-1] :] if isinstance(total, Tensor) else 0)
            x = x[..., -y.shape[-1] :] + res(y)
        return self.out(total)


class Siamese(nn.Module):
    """One tower, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(cbr(3, 16, 3, 2), cbr(16, 24, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.tower(x), self.tower(x.flip(-1))
        return self.head(torch.cat([a, b, (a - b).abs()], 1))


class EncoderDecoder(nn.Module):
    """torch's own transformer encoder on convolutional tokens."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, d) * 0.1)
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2) + self.position).mean(1))


class Maxout(nn.Module):
    """Pieces of each unit side by side, the largest wins."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 24, 3), nn.Conv2d(8, 30, 3), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).unflatten(1, (8, 3)).amax(2)
        n, _, h, w = self.b(x).shape
        return self.head(self.b(x).reshape(n, 10, 3, h, w).amax(2).mean((2, 3)))


class ConvGRU(nn.Module):
    """A recurrent cell of convolutions, three steps."""

    def __init__(self, c: int = 12) -> None:
        super().__init__()
        self.c, self.inp = c, nn.Conv2d(3, c, 3, padding=1)
        self.gates, self.candidate = nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.Conv2d(2 * c, c, 3, padding=1)
        self.out = nn.Conv2d(c, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        h = torch.zeros(x.shape[0], self.c, *x.shape[-2:])
        for _ in range(3):
            z, r = self.gates(torch.cat([x, h], 1)).sigmoid().split(self.c, 1)
            h = (1 - z) * h + z * torch.tanh(self.candidate(torch.cat([x, r * h], 1)))
        return self.out(h)


OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (UNet, (2, 3, 64, 64)),
    "unet_upsample": (lambda: UNet(transposed=False), (2, 3, 64, 64)),
    "yolo": (YOLO, (2, 3, 128, 128)),
    "fpn": (FPN, (2, 3, 64, 64)),
    "deeplab_aspp": (ASPP, (2, 3, 64, 64)),
    "edsr": (SuperResolution, (2, 3, 24, 24)),
    "dcgan": (Generator, (4, 32)),
    "shufflenet_v1": (ShuffleV1, (2, 3, 32, 32)),
    "shufflenet_v2": (shufflenet_v2, (2, 3, 64, 64)),
    "volume": (Volume, (2, 1, 8, 16, 16)),
    "tcn": (TCN, (2, 2, 64)),
    "wavenet": (WaveNet, (2, 1, 64)),
    "siamese": (Siamese, (2, 3, 32, 32)),
    "torch_transformer": (EncoderDecoder, (2, 3, 32, 32)),
    "maxout": (Maxout, (2, 3, 16, 16)),
    "conv_gru": (ConvGRU, (2, 3, 16, 16)),
}
