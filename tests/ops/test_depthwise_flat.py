"""Narrow and ragged widths: depthwise over whole rows of floats, one channel, odd channels two at a time; against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import ops
from tests.ops.conv_cases import error

LAST = torch.channels_last


def own_and_exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: int = 1,
    padding: int = 1,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    packed = ops.pack_conv2d_weight(weight, groups)
    settings_ = (list(weight.shape), stride, padding, 1, groups, activation)
    own = ops.compact_conv2d(x, packed, bias, residual, None, None, *settings_)
    shift = None if bias is None else bias.double()
    y = F.conv2d(x.double(), weight.double(), shift, stride, padding, 1, groups)
    return own, ops.ACTIVATIONS[activation](y if residual is None else y + residual.double())


def problem(
    batch: int, channels: int, height: int, width: int, side: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator).contiguous(memory_format=LAST)
    weight = torch.randn(channels, 1, side, side, generator=generator)
    return x, weight, torch.randn(channels, generator=generator)


@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 40) | st.sampled_from([15, 30, 31, 46, 47]),  # these take two pixels at a time
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    side=st.sampled_from([3, 3, 3, 5, 7]),
    padding=st.integers(0, 4),
    biased=st.booleans(),
    added=st.booleans(),
    activation=st.sampled_from(["none", "relu", "relu6", "silu"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_width(
    target: torch.device,
    batch: int,
    channels: int,
    height: int,
    width: int,
    side: int,
    padding: int,
    biased: bool,
    added: bool,
    activation: str,
    seed: int,
) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    height, width = (max(size, side - 2 * padding) for size in (height, width))
    x, weight, bias = problem(batch, channels, height, width, side, seed)
    size = [batch, channels, *(s + 2 * padding - side + 1 for s in (height, width))]
    residual = torch.randn(size).contiguous(memory_format=LAST) if added else None
    arguments = (x, weight, bias if biased else None, residual, channels, 1, padding, activation)
    assert error(*own_and_exact(*arguments)) < 2e-5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 31, 112, 112),
        (3, 5, 17, 9),
        (1, 1, 40, 33),
        (2, 96, 28, 28),
        (2, 55, 28, 28),  # rows that meet in few cache sets, by themselves and together with the outputs
        (1, 61, 28, 28),
        (4, 64, 16, 16),
        (1, 512, 14, 14),  # not even the fewest rows fit
        (2, 128, 29, 32),
    ],
)
def test_bands_of_rows(target: torch.device, shape: tuple[int, int, int, int], threads: int) -> None:
    """Maps whose rows do not stay in the L1 cache together, and rows that threads share."""
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    arguments = problem(*shape, 3, sum(shape))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y, expected = own_and_exact(*arguments, None, shape[1])
    finally:
        torch.set_num_threads(before)
    assert error(y, expected) < 2e-5
    assert torch.equal(y, own_and_exact(*arguments, None, shape[1])[0]), "the bands decided about a sum"


@pytest.mark.parametrize("channels", [1, 3, 5, 15, 16, 19, 31])
def test_infinite_inputs_reach_only_their_windows(target: torch.device, channels: int) -> None:
    """Neither the lanes behind a row nor the windows beside a pixel meet it with weights of zero."""
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    x, weight, bias = problem(2, channels, 7, 6, 3, channels)
    for row, column in ((0, 0), (3, 5), (6, 2)):
        x[0, 0, row, column] = torch.inf
    arguments = (x, weight, bias, None, channels, 1, 1, "none")
    own, exact = own_and_exact(*arguments)
    assert torch.equal(own.isfinite(), exact.isfinite())


@given(
    channels=st.integers(1, 11),
    outputs=st.sampled_from([1, 3, 5, 7, 8, 17, 21, 24]),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    width=st.integers(12, 30),
    infinite=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_channels_two_at_a_time(
    target: torch.device,
    channels: int,
    outputs: int,
    kernel: int,
    stride: int,
    width: int,
    infinite: bool,
    seed: int,
) -> None:
    """Up to 8 last outputs: inputs go in pairs, and the one left over in a row of taps alone."""
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, 7, width * stride, generator=generator).contiguous(memory_format=LAST)
    weight = torch.randn(outputs, channels, kernel, kernel, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    if infinite:
        x[0, seed % channels, 3, seed % width] = torch.inf
    arguments = (x, weight, bias, None, 1, stride, kernel // 2, "none")
    y, expected = own_and_exact(*arguments)
    finite = expected.isfinite()
    # a transform for small maps would spread what is infinite over its tile: these widths have none
    if min(channels, outputs) < 9:
        assert torch.equal(y.isfinite(), finite)
        assert error(y[finite], expected[finite]) < 2e-5
    elif not infinite:
        assert error(y, expected) < 2e-5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_one_channel(target: torch.device, side: int, stride: int) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    for batch, height, width in ((1, 1, 1), (2, 9, 17), (3, 16, 33)):
        x, weight, bias = problem(batch, 1, height, width, side, side)
        arguments = (x, weight, bias, None, 1, stride, side // 2, "relu")
        assert error(*own_and_exact(*arguments)) < 2e-5
