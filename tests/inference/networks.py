"""Small networks, each with a trap for something that fuses layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.models import ArticleNet, resnet20


class Concat(nn.Module):
    """Branches with functional activations, concatenated; GELU and hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.b = nn.Conv2d(3, 5, (1, 3), padding=(0, 1), bias=False)
        self.c = nn.Conv2d(12, 6, 3, dilation=2, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.norm(self.a(x))), F.hardswish(self.b(x))], 1)
        return F.gelu(self.c(both))


class Depthwise(nn.Module):
    """Inverted residual: 1x1, depthwise 3x3 with stride 1, 1x1, sum; ReLU6 and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(3, 13, 1, bias=False), nn.BatchNorm2d(13), nn.ReLU6(inplace=True)
        )
        self.depth = nn.Sequential(
            nn.Conv2d(13, 13, 3, padding=1, groups=13, bias=False), nn.BatchNorm2d(13), nn.SiLU(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(13, 3, 1, bias=False), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depth(self.expand(x)))


class Shared(nn.Module):
    """One convolution called twice, with two norms; one ReLU for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.one, self.two, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(self.conv(x)))
        return self.relu(self.two(self.conv(x)))


class Branching(nn.Module):
    """Control flow that depends on values: no symbolic trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
        )
        self.twice, self.relu = nn.Conv2d(6, 6, 1), nn.ReLU()
        self.last = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().sum() < 0:
            raise AssertionError("never")
        x = self.act(self.norm(self.conv(x)))
        x = self.relu(self.twice(self.relu(self.twice(x))))
        return self.last(x)


class Peeking(nn.Module):
    """What lies between convolution and norm has another reader, in both worlds."""

    def __init__(self, symbolic: bool) -> None:
        super().__init__()
        self.symbolic = symbolic
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not self.symbolic and float(x.sum()) == 1e30:
            return {}
        raw = self.conv(x)
        normed = self.norm(raw)
        return {"raw": raw, "out": self.relu(normed), "sum": normed.sum() + raw.mean()}


class InPlace(nn.Module):
    """A sum whose other term is rewritten between the convolution and the sum; a discarded in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.conv(x)
        x.mul_(0.5)
        z = self.other(x)
        z.relu_()
        return F.relu(y + x) + z


class Broadcast(nn.Module):
    """A sum that broadcasts, a sum of a tensor with itself, and a scaled sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x) + x.mean((2, 3), keepdim=True))
        y = self.b(y)
        y = F.relu(y + y)
        return F.relu(torch.add(self.c(y), x, alpha=2))


class Flattening(nn.Module):
    """``view`` behind a map, a functional norm, keyword arguments and defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv2d(3, 5, 3, stride=2),
            nn.BatchNorm2d(5),
            nn.Linear(5 * 49, 3),
        )

    def forward(self, image: Tensor, scale: float = 2.0, bias: Tensor | None = None) -> Tensor:
        n = self.norm
        y = F.batch_norm(self.conv(image), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)
        y = self.head(torch.sigmoid(y).view(image.size(0), -1)) * scale
        return y if bias is None else y + bias


class Odd(nn.Module):
    """Reflecting padding, a parametrised weight, a norm without statistics, a subclass, a hook, asymmetric "same"."""

    def __init__(self) -> None:
        super().__init__()

        class Doubling(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        self.reflect = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.param = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.stats = nn.BatchNorm2d(4, track_running_stats=False)
        self.subclass = Doubling(4, 4, 1)
        self.hooked = nn.Conv2d(4, 4, 1)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.same = nn.Conv2d(4, 4, 2, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stats(self.param(F.relu(self.reflect(x))))
        return self.same(F.relu(self.hooked(F.relu(self.subclass(x)))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: ArticleNet(3, 16, (5, 6, 7, 9, 11), batch_norm=True),
    "residual": lambda: resnet20(width=4),
    "concat": Concat,
    "depthwise": Depthwise,
    "shared": Shared,
    "branching": Branching,
    "peeking": lambda: Peeking(True),
    "peeking, branching": lambda: Peeking(False),
    "in place": InPlace,
    "broadcast": Broadcast,
    "flattening": Flattening,
    "odd": Odd,
}


def network(name: str, seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose norms have statistics that matter."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2.0)
    return model.eval()
