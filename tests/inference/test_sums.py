"""Sums behind convolutions whose sides share the batch in the example only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference.padded import PaddedConv2d
from lightning_prune.inference.sums import SummingConv2d
from lightning_prune.inputs import call_model

ACTIVATIONS = (torch.relu, nn.functional.gelu)


class Embedding(nn.Module):
    """A map of positions, the same for all images; then layers enough for a segment."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.positions = nn.Parameter(torch.randn(1, 8, 12, 12))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.conv(x) + self.positions)
        return self.c(torch.relu(self.b(torch.relu(self.a(y)))) + y)


class Lines(nn.Module):
    """The same over one dimension."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(3, 8, 3, padding=1)
        self.activation = activation

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.activation(self.first(x) + self.second(other))


class Other(nn.Module):
    """Two inputs, each of which may be a single image."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.activation = activation

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.activation(self.conv(x) + other)


def check(fast: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.inference_mode():
        exact = call_model(copy.deepcopy(model).double(), tuple(x.double() for x in inputs))
        found, before = call_model(fast, inputs), [x.clone() for x in inputs]
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["own", "vendor", "auto"])
@pytest.mark.parametrize("images", [1, 4])
def test_positions(
    images: int, backend: str, activation: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
    model = Embedding(activation)
    fast = optimize_for_inference(model, torch.randn(images, 3, 12, 12))
    for batch in (4, 1, 2):
        check(fast, model, (torch.randn(batch, 3, 12, 12),))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["own", "vendor"])
@pytest.mark.parametrize(("kind", "shape"), [(Other, (3, 8, 8)), (Lines, (3, 20))])
def test_either_side_may_be_a_single_image(
    kind: type[nn.Module], shape: tuple[int, ...], backend: str, activation: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
    model = kind(activation)
    fast = optimize_for_inference(model, (torch.randn(1, *shape), torch.randn(1, *shape)))
    for first, second in ((1, 1), (4, 1), (1, 4), (4, 4)):
        inputs = torch.randn(first, *shape), torch.randn(second, *shape)
        check(fast, model, inputs)
        compiled = torch.compile(fast, backend="eager", dynamic=False)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
def test_equal_shapes_stay_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")
    fast = optimize_for_inference(Other(torch.relu), (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)))
    monkeypatch.setattr(SummingConv2d, "_summed", lambda *arguments: pytest.fail("a sum of its own"))
    with torch.inference_mode():
        fast(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))


def test_gradients_of_a_sum_that_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")
    model = Embedding(torch.relu)
    fast = optimize_for_inference(model, torch.randn(1, 3, 12, 12))
    x, grads = torch.randn(4, 3, 12, 12), []
    for network in (model, fast):
        given = x.clone().requires_grad_()
        network(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")
    fast = optimize_for_inference(Other(torch.relu), (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="must match the size"):
            fast(torch.randn(4, 3, 8, 8), torch.randn(3, 3, 8, 8))
        with pytest.raises((RuntimeError, ValueError), match="inputs|channels"):
            fast(torch.randn(4, 5, 8, 8), torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_at_multiples_of_eight_channels(activation: str) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    padded = PaddedConv2d(conv, activation)
    with torch.no_grad():
        for images, others in ((1, 4), (4, 1), (2, 2)):
            x, residual = torch.randn(images, 3, 8, 8), torch.randn(others, 5, 8, 8)
            expected = ops.ACTIVATIONS[activation](conv(x) + residual)
            torch.testing.assert_close(padded(x, residual), expected, rtol=1e-4, atol=1e-5)
