"""Convolutions of maps of a few pixels, pair by pair of pixels, against the float64 reference."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.conv_cases import ConvCase, assert_agrees


@st.composite
def small_map_cases(draw: st.DrawFn) -> ConvCase:
    """Up to 16 pixels in and about 4 out, channels and images around multiples of a vector, taps that reach nothing."""
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    size = tuple(
        max(draw(st.integers(1, 4)), d * (k - 1) + 1 - 2 * p)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    return ConvCase(
        batch=draw(st.integers(14, 70)), size=(size[0], size[1]), groups=1, inputs=draw(st.integers(14, 70)),
        outputs=draw(st.integers(14, 40)), kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        layout="channels_last", bias=draw(st.booleans()), gate=False, live_in=None, live_out=None,
        activation="none", dtype=torch.float32, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@given(case=small_map_cases(), in_gated=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forward_and_backward(target: torch.device, case: ConvCase, in_gated: bool) -> None:
    assert_agrees(target, case, in_gated, weight_format=torch.channels_last)
