"""Norms that take along what follows in their module's forward: its numbers, or the forward itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import fused_norms, norm_ways, ops
from lightning_prune.fused_norms import FusedNorms

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


class Block(nn.Module):
    """Parts of a residual block; what is done with them is for subclasses to say."""

    fused: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu, self.act = nn.ReLU(inplace=True), nn.SiLU()
        self.down: nn.Module | None = None
        self.scale, self.calls = 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InPlace(Block):
    fused = ("relu", "relu+")

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision writes it."""
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            identity = self.down(x)
        out += identity
        return self.relu(out)


class Functional(Block):
    fused = ("relu", "silu+")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.silu((x if self.down is None else self.down(x)) + self.bn2(self.conv2(out)))


class Methods(Block):
    fused = ("silu", "sigmoid+")

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x))) * self.scale
        return self.bn2(self.conv2(out)).add(x).sigmoid()


class BothAreNorms(Block):
    fused = ("relu+",)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(x)) + self.bn1(self.conv1(x)))


class Broadcast(Block):
    """The sum is of another shape than the norm's output."""

    fused = ()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)) + F.adaptive_avg_pool2d(x, 1))


class TwoReaders(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return F.relu(out) + out


class SumReadTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)) + x
        return F.relu(out) * out


class WritesToTheOther(Block):
    def forward(self, x: Tensor) -> Tensor:
        other = self.conv2(x)
        seen = other
        other += self.bn1(self.conv1(x))
        return F.relu(other) + seen


class Counts(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.bn1(self.conv1(x)))


class Helper(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self._conv(x)))

    def _conv(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv1(x)


class Optional(Block):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return F.relu(self.bn1(self.conv1(x if other is None else other)))


class Decides(Block):
    def forward(self, x: Tensor) -> Tensor:
        other = self.down
        return F.relu(self.bn1(self.conv1(x if other is None else other(x))))


class Chance(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) + torch.rand(1, dtype=x.dtype)


class Listens(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out.register_hook(print)
        return F.relu(out)


class Alias(Block):
    """What is read at the end has been written to."""

    fused = ("relu",)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(x)
        seen = out
        out -= F.relu(self.bn1(self.conv1(x)))
        out *= 2.0
        return seen


class Keeps(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        KEPT.append(out)
        return F.relu(out)


KEPT: list[Tensor] = []
FUSED = [InPlace, Functional, Methods, BothAreNorms, Alias]
PLAIN = [
    TwoReaders,
    SumReadTwice,
    WritesToTheOther,
    Counts,
    Helper,
    Optional,
    Decides,
    Chance,
    Listens,
    Keeps,
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiled kernel wins, at any size; the activations it was called with, and + for a residual sum."""
    found: list[str] = []
    plain = fused_norms._forward

    def forward(*args: Any) -> Any:
        found.append(args[4] + ("+" if args[7] is not None else ""))
        return plain(*args)

    monkeypatch.setattr(fused_norms, "_forward", forward)
    monkeypatch.setattr(fused_norms, "_measure", lambda *a: True)
    monkeypatch.setattr(fused_norms, "LEAST_ELEMENTS", 0)
    return found


def pair(kind: type[Block]) -> tuple[Block, Block, Tensor]:
    torch.manual_seed(0)
    model = kind().double()
    return model, copy.deepcopy(model), torch.randn(3, 6, 5, 4, dtype=torch.float64)


def step(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = (call or model)(x * 1.0)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def same(model: Block, twin: Block, x: Tensor, call: Any = None) -> None:
    first, second = (step(net, x, call and call(net)) for net in (model, twin))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [*FUSED, Broadcast])
def test_the_numbers_are_those_of_the_forward(
    kind: type[Block], memory_format: torch.memory_format, calls: list[str]
) -> None:
    model, twin, x = pair(kind)
    fused = FusedNorms(model)
    for _ in range(2):
        same(model, twin, x.contiguous(memory_format=memory_format))
    if kind is Broadcast:
        assert calls == ["none"] * 2
    else:
        assert sorted(c for c in calls if c != "none") == sorted(kind.fused * 2)
    calls.clear()
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    fused.detach()
    same(model.train(), twin.train(), x)
    assert not calls
    assert set(model.__dict__) == set(twin.__dict__)


@pytest.mark.parametrize("kind", PLAIN)
def test_what_a_graph_cannot_say_is_left_alone(kind: type[Block], calls: list[str]) -> None:
    model, _, x = pair(kind)
    FusedNorms(model)
    assert "_compiled_call_impl" not in model.__dict__
    model(x)
    assert set(calls) == {"none"}
    assert model.calls == (kind in (Counts, Helper))
    assert (KEPT != []) == (kind is Keeps)
    KEPT.clear()


def test_a_forward_that_has_changed_since_is_the_forward(calls: list[str]) -> None:
    model, twin, x = pair(InPlace)
    FusedNorms(model)
    for net in (model, twin):
        torch.manual_seed(1)
        net.down = nn.Conv2d(6, 6, 1).double()
    same(model, twin, x)
    for net in (model, twin):
        net.down = None
        net.relu = nn.LeakyReLU(0.3)
    same(model, twin, x)
    model, twin, x = pair(Methods)
    FusedNorms(model)
    for net in (model, twin):
        net.scale = 0.5
    same(model, twin, x)
    for net in (model, twin):
        net.forward = lambda x, net=net: net.conv1(x).relu()  # type: ignore[method-assign]
    same(model, twin, x)
    assert not any(c != "none" for c in calls)


@pytest.mark.parametrize("where", ["", "bn2", "relu"])
def test_hooks_see_what_they_saw(where: str, calls: list[str]) -> None:
    model, twin, x = pair(InPlace)
    FusedNorms(model)
    seen: list[Tensor] = []
    for net in (model, twin):
        net.get_submodule(where).register_forward_hook(
            lambda module, args, output: seen.append(output.detach().clone())
        )
    same(model, twin, x)
    half = len(seen) // 2
    torch.testing.assert_close(seen[:half], seen[half:])
    assert half == {"": 1, "bn2": 1, "relu": 2}[where]
    assert "relu+" not in calls


def test_checkpoints_second_derivatives_autocast_and_modes(calls: list[str]) -> None:
    for kind in FUSED:
        model, twin, x = pair(kind)
        FusedNorms(model)
        for reentrant in (False, True):
            same(model, twin, x, lambda net, r=reentrant: partial(checkpoint, net, use_reentrant=r))
        found = []
        for net in (model, twin):
            inputs = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(net(inputs * 1.0).square().sum(), inputs, create_graph=True)
            grad.square().sum().backward()
            found.append([grad.detach(), inputs.grad])
        torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)
    model, _, x = pair(Functional)
    FusedNorms(model)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        model(x)
    with torch.device("cpu"):  # a function mode
        model(x)
    torch.compile(model, backend="eager")(x)
    assert not {"relu", "silu+"} & set(calls)


def test_gradients_against_differences(calls: list[str]) -> None:
    model, _, x = pair(Functional)
    FusedNorms(model)
    small = x[:2, :, :3, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(model, small)
    assert "silu+" in calls


def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, x = pair(InPlace)
    FusedNorms(model)
    asked: list[Any] = []
    monkeypatch.setattr(fused_norms, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(norm_ways, "faster", lambda run, device: asked.append(run) or run(True) or run(False))
    for _ in range(2):
        same(model, twin, x)
    # Each site once for the whole of it, and once for the norm alone, which runs because the whole is slower.
    assert len(asked) == 4
