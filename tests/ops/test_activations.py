"""The activations of the kernels, on the CPU at every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

from lightning_prune import ops
from lightning_prune.ops.reference import ACTIVATIONS

SMOOTH = ("silu", "hardswish", "gelu", "sigmoid")


def through_a_convolution(x: torch.Tensor, activation: str, channels: int) -> torch.Tensor:
    """The activation of ``channels`` copies of ``x``, by a 1x1 convolution with the unit matrix."""
    weight = torch.eye(channels, dtype=x.dtype, device=x.device)[:, :, None, None]
    maps = x.view(1, 1, 1, -1).expand(1, channels, 1, -1).contiguous(memory_format=torch.channels_last)
    packed = ops.pack_conv2d_weight(weight)
    y = ops.compact_conv2d(maps, packed, None, None, None, None, weight.shape, activation=activation)
    torch.testing.assert_close(
        y, y[:, :1].expand_as(y), rtol=0, atol=0, equal_nan=True
    )  # full and partial vectors
    return y[0, 0, 0]


@pytest.mark.parametrize("channels", [1, 7, 19])
@pytest.mark.parametrize("activation", SMOOTH)
def test_values(activation: str, channels: int, target: torch.device) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -100.0, 100.0, 1e20])])
    y = through_a_convolution(x.to(target), activation, channels).cpu()
    expected = ACTIVATIONS[activation](x.double())
    # a few units in the last place of the argument: gelu and silu multiply with it
    error = (y.double() - expected).abs() / x.double().abs().clamp(
        min=1.0 if activation == "sigmoid" else 1e-3
    )
    assert float(error.max()) < 5e-7
    assert y[-1] == (1.0 if activation == "sigmoid" else 1e20)


@pytest.mark.parametrize("activation", [*SMOOTH, "relu", "relu6"])
def test_not_a_number_stays_one(activation: str, target: torch.device) -> None:
    y = through_a_convolution(torch.tensor([1.0, float("nan"), -2.0], device=target), activation, 17)
    assert y.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("activation", SMOOTH)
def test_derivatives(activation: str, target: torch.device) -> None:
    x = torch.linspace(-12, 12, 1601, device=target)
    maps = (
        x.view(1, 1, 1, -1).expand(1, 5, 1, -1).contiguous(memory_format=torch.channels_last).requires_grad_()
    )
    weight = torch.eye(5, device=target)[:, :, None, None]
    y = ops.masked_conv2d(maps, weight, None, activation=activation)
    (grad,) = torch.autograd.grad(y.sum(), maps)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](exact).sum(), exact)
    torch.testing.assert_close(grad[0, 2, 0].double(), expected, rtol=1e-5, atol=2e-6)
