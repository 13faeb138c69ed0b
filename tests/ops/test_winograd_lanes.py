"""3x3 convolutions with few channels, whose Winograd tiles lie in the lanes of vectors, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from tests.ops.conv_cases import ConvCase, assert_agrees, error


@st.composite
def lane_cases(draw: st.DrawFn) -> ConvCase:
    """3 to 26 channels on either side, from a few to some hundred tiles of either size, dense channels_last maps."""
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    size = tuple(max(draw(st.integers(1, 19)), 3 - 2 * p) for p in padding)
    return ConvCase(
        batch=draw(st.sampled_from([1, 3, 16, 33])), size=(size[0], size[1]), groups=1, inputs=draw(st.integers(3, 26)),
        outputs=draw(st.integers(3, 26)), kernel=(3, 3), stride=(1, 1), padding=padding, dilation=(1, 1),
        layout="channels_last", bias=draw(st.booleans()), gate=draw(st.booleans()), live_in=None, live_out=None,
        activation=draw(st.sampled_from(["none", "relu"])), dtype=torch.float32, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@given(case=lane_cases(), in_gated=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forward_and_backward(target: torch.device, case: ConvCase, in_gated: bool) -> None:
    assert_agrees(target, case, in_gated)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing_but_the_rounding(threads: int) -> None:
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 8, 16, 16, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(12, 8, 3, 3, generator=generator).requires_grad_()
    grad = torch.randn(70, 12, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for _ in range(2):
            y = ops.masked_conv2d(x, weight, padding=(1, 1))
            found.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    wanted = (expected, *torch.autograd.grad(expected, (x, weight), grad.double()))
    assert all(error(a, b) < 2e-5 for a, b in zip(found[0], wanted, strict=True))
