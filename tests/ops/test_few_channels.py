"""Convolutions with few channels, which compute several columns at a time, against the float64 reference."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.conv_cases import ConvCase, assert_agrees


@st.composite
def few_channel_cases(draw: st.DrawFn) -> ConvCase:
    """1 to 9 channels on either side, widths around multiples of 2 and 4, channels_last, nothing dead."""
    kernel = (draw(st.integers(1, 3)), draw(st.integers(2, 5)))
    padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    dilation = (draw(st.integers(1, 2)), 1)
    size = tuple(
        max(draw(st.integers(1, 17)), d * (k - 1) + 1 - 2 * p)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    return ConvCase(
        batch=draw(st.integers(0, 3)), size=(size[0], size[1]), groups=1, inputs=draw(st.integers(1, 9)),
        outputs=draw(st.integers(1, 9)), kernel=kernel, stride=(1, 1), padding=padding, dilation=dilation,
        layout="channels_last", bias=draw(st.booleans()), gate=draw(st.booleans()), live_in=None, live_out=None,
        activation=draw(st.sampled_from(["none", "silu"])), dtype=torch.float32, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@given(case=few_channel_cases(), in_gated=st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forward_and_backward(target: torch.device, case: ConvCase, in_gated: bool) -> None:
    assert_agrees(target, case, in_gated)


@st.composite
def strided_cases(draw: st.DrawFn) -> ConvCase:
    """3x3 at stride 2 with up to 18 channels, maps of even and odd sizes, some wide enough for rows of register tiles."""
    return ConvCase(
        batch=draw(st.integers(0, 3)), size=(draw(st.integers(1, 8)), draw(st.integers(1, 30))), groups=1,
        inputs=draw(st.integers(1, 18)), outputs=draw(st.integers(1, 18)), kernel=(3, 3), stride=(2, 2), padding=(1, 1),
        dilation=(1, 1), layout=draw(st.sampled_from(["channels_last", "contiguous"])), bias=draw(st.booleans()),
        gate=draw(st.booleans()), live_in=None, live_out=None, activation=draw(st.sampled_from(["none", "relu"])),
        dtype=torch.float32, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@given(case=strided_cases(), in_gated=st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_strided_forward_and_backward(target: torch.device, case: ConvCase, in_gated: bool) -> None:
    assert_agrees(target, case, in_gated)


@st.composite
def plane_cases(draw: st.DrawFn) -> ConvCase:
    """Up to four channels on one side, rows that fill vectors of pixels and others, kernels up to 3x3, strides up to 2."""
    sides = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 33]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    inputs, outputs = sides if draw(st.booleans()) else sides[::-1]
    return ConvCase(
        batch=draw(st.sampled_from([0, 1, 3, 11])), size=(draw(st.integers(3, 40)), draw(st.integers(12, 70))), groups=1,
        inputs=inputs, outputs=outputs, kernel=kernel, stride=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        padding=(draw(st.integers(0, 2)), draw(st.integers(0, 2))), dilation=(1, 1), layout="channels_last",
        bias=draw(st.booleans()), gate=draw(st.booleans()), live_in=None, live_out=None, activation="none",
        dtype=torch.float32, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@given(case=plane_cases(), in_gated=st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_planes_forward_and_backward(target: torch.device, case: ConvCase, in_gated: bool) -> None:
    if target.type == "cpu" and "avx512" not in os.environ.get("LIGHTNING_PRUNE_CPU_LEVEL", ""):
        pytest.skip("only AVX-512 has such kernels")
    assert_agrees(target, case, in_gated)
