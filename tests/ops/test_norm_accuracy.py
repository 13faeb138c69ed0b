"""Gradients of the norm, and the convolution in front of it, against float64: what docstrings state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prune.ops import reference_norm
from lightning_prune.ops.error_bounds import error_bound

OP = torch.ops.lightning_prune
EPS = 1e-5
#: batch, channels, side of the map
SHAPES = [(4, 5, 3), (8, 16, 16), (32, 33, 20), (32, 8, 8), (8, 4, 48)]


@pytest.fixture(autouse=True)
def on_the_cpu(target: torch.device) -> None:
    if target.type == "cuda":
        pytest.skip("bounds of the CPU kernels")


def error(found: Tensor, exact: Tensor, scale: Tensor) -> float:
    return float(((found - exact).abs() / scale).max())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("spread", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize(
    ("mean", "of_map", "of_vector"), [(0, 1e-5, 1e-6), (10, 1e-5, 1e-6), (1000, 1e-4, 2e-5)]
)
def test_gradients(mean: float, of_map: float, of_vector: float, spread: float, last: bool) -> None:
    generator = torch.Generator().manual_seed(int(mean))
    for batch, channels, size in SHAPES:
        x, grad = (torch.randn(batch, channels, size, size, generator=generator) for _ in range(2))
        x = (x + mean) * spread
        if last:
            x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
        vectors = [torch.randn(channels, generator=generator) for _ in range(3)]
        own = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *vectors)]
        wide = [t.double().requires_grad_() for t in (x, *vectors)]
        rest = (None, None, None, EPS, "none")
        y = OP.masked_batch_norm_act(own[0], None, *own[1:], *rest)[0]
        exact_y = reference_norm.masked_batch_norm_act(wide[0], None, *wide[1:], *rest)[0]
        found = torch.autograd.grad(y, own, grad)
        exact = torch.autograd.grad(exact_y, wide, grad.double())
        weight, bias, gate = (v.double().abs() for v in vectors)
        deviation = (x.double().var((0, 2, 3), correction=0) + EPS).sqrt()
        centred = x.double() - x.double().mean((0, 2, 3), keepdim=True)
        sums = (grad.double().abs() * (1 + centred.abs() / deviation.view(1, -1, 1, 1))).sum((0, 2, 3))
        of_x = (weight * gate / deviation).view(1, -1, 1, 1) * grad.double().abs().max()
        scales = (of_x, sums * gate, sums * gate, sums * (weight + bias))
        for bound, a, b, scale in zip((of_map, *[of_vector] * 3), found, exact, scales, strict=True):
            assert error(a, b, scale) <= bound


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(4, 16), (16, 16), (33, 14), (64, 4)])
def test_a_convolution_and_its_norm_err_as_each_does_alone(channels: int, size: int, last: bool) -> None:
    generator = torch.Generator().manual_seed(channels)

    def randn(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator)
        return t.to(memory_format=torch.channels_last) if last and len(shape) == 4 else t

    x, weight = randn(16, channels, size, size), randn(channels, channels, 3, 3)
    vectors = randn(channels), randn(channels)
    lists = (None, None, False, [1, 1, 1, 1, 1, 1, 1])
    y, middle, mean, var = OP.masked_conv_norm_act(
        x, weight, None, None, *lists, None, *vectors, None, 0, EPS, "none", None, None, None, 0.1
    )
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    products = torch.nn.functional.conv2d(x.double().abs(), weight.double().abs(), padding=1).max()
    usual = max(error_bound(weight.shape, name).usual for name in ("direct", "winograd2", "winograd4"))
    assert float((middle - exact).abs().max()) <= usual * float(products)
    of_middle = reference_norm.masked_batch_norm_act(
        middle.double(), None, *(v.double() for v in vectors), None, None, None, None, EPS, "none"
    )
    largest = float(of_middle[0].abs().max())
    assert float((y - of_middle[0]).abs().max()) <= 1e-5 * largest
    torch.testing.assert_close(mean.double(), of_middle[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), of_middle[2], rtol=1e-5, atol=0)
