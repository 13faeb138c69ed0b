"""Depthwise convolutions with oblong, dilated and large kernels and every stride, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from tests.ops.conv_cases import error

LAST = torch.channels_last


@given(
    batch=st.integers(1, 2),
    channels=st.integers(2, 70),
    spare=st.sampled_from([0, 0, 3, 8]),  # channels of a wider map that lie behind the input's
    size=st.tuples(st.integers(1, 5), st.integers(1, 90)) | st.tuples(st.integers(1, 24), st.integers(1, 24)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 11)) | st.sampled_from([(3, 3), (9, 9), (11, 1)]),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    biased=st.booleans(),
    added=st.booleans(),
    activation=st.sampled_from(["none", "relu6", "silu"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_taps(
    target: torch.device,
    batch: int,
    channels: int,
    spare: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    biased: bool,
    added: bool,
    activation: str,
    threads: int,
    seed: int,
) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = (min(padding[0], spans[0] - 1), min(padding[1], spans[1] - 1))
    height, width = (max(s, span - 2 * p) for s, span, p in zip(size, spans, padding, strict=True))
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((batch, channels + spare, height, width), torch.nan).contiguous(memory_format=LAST)
    x = wide[:, :channels]
    x.copy_(torch.randn(x.shape, generator=generator))
    weight = torch.randn(channels, 1, *kernel, generator=generator)
    bias = torch.randn(channels, generator=generator) if biased else None
    settings_ = (list(stride), list(padding), list(dilation), channels)
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *settings_)
    residual = torch.randn(exact.shape, generator=generator).contiguous(memory_format=LAST) if added else None
    exact = ops.ACTIVATIONS[activation](exact if residual is None else exact + residual.double())
    packed = ops.pack_conv2d_weight(weight, channels)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        own = ops.compact_conv2d(
            x, packed, bias, residual, None, None, list(weight.shape), *settings_, activation
        )
    finally:
        torch.set_num_threads(before)
    assert error(own, exact) < 2e-5


@pytest.mark.usefixtures("target")
def test_infinite_inputs_stay_where_they_are_read() -> None:
    """A tap outside of the map, a lane of another channel, must not meet what is not finite."""
    x = torch.zeros(1, 21, 3, 40).contiguous(memory_format=LAST)
    x[0, 4, 1, 7], x[0, 20, 2, 39] = torch.inf, torch.nan
    weight = torch.ones(21, 1, 1, 9)
    packed = ops.pack_conv2d_weight(weight, 21)
    y = ops.compact_conv2d(x, packed, None, None, None, None, list(weight.shape), 1, [0, 4], 1, 21, "none")
    assert torch.equal(y.isfinite(), F.conv2d(x, weight, None, 1, (0, 4), 1, 21).isfinite())
    assert int((~y.isfinite()).sum()) == 9 + 5
