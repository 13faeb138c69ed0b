"""Convolutions with few channels, which compute several columns at a time, against the float64 reference."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune.ops import reference
from tests.ops.conv_cases import TOLERANCE, ConvCase, error

OP = torch.ops.lightning_prune


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
    x, weight, bias, gate, _, _ = case.tensors(target)
    in_gate = case.randn(case.inputs).to(target) if in_gated and target.type == "cpu" else None
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, weight, bias, gate, in_gate)
        if t is not None
    ]
    rest = iter(leaves)
    own = [None if t is None else next(rest) for t in (x, weight, bias, gate, in_gate)]
    y = OP.masked_conv2d(*own[:4], None, None, *case.settings, "auto", own[4])
    wide = [None if t is None else t.detach().double().requires_grad_() for t in own]
    scaled = wide[0] if wide[4] is None else wide[0] * wide[4][:, None, None]
    expected = reference.masked_conv2d(scaled, *wide[1:4], None, None, *case.settings)
    assert error(y, expected) < TOLERANCE[case.dtype]
    grad_y = case.randn(*y.shape).to(target)
    found = torch.autograd.grad(y, leaves, grad_y.contiguous(memory_format=torch.channels_last))
    wanted = torch.autograd.grad(
        expected, [t for t in wide if t is not None], grad_y.double(), allow_unused=True
    )
    for grad, true in zip(found, wanted, strict=True):
        assert error(grad, torch.zeros_like(grad).double() if true is None else true) < TOLERANCE[case.dtype]
