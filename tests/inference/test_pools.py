"""Pools inside runs of layers: the same numbers as torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import ops
from tests.inference.test_segment import TOLERANCE, error, segmented, segments, unit

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


@pytest.mark.usefixtures("level")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(1, 40),
    window=st.sampled_from([(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 1, 0), (5, 3, 2)]),
    height=st.integers(5, 12),
    width=st.integers(5, 12),
    nans=st.booleans(),
)
def test_max_pool(channels: int, window: tuple[int, int, int], height: int, width: int, nans: bool) -> None:
    kernel, stride, padding = window
    pool = nn.MaxPool2d(kernel, stride, padding)
    convolutions = [nn.Conv2d(channels, channels, 1, groups=channels, bias=False) for _ in range(2)]
    for conv in convolutions:
        nn.init.ones_(conv.weight)
    model = nn.Sequential(convolutions[0], pool, convolutions[1]).eval()
    x = torch.randn(3, channels, height, width)
    network = segmented(model, x)[0]
    assert segments(network)
    x = torch.where(x > 2, torch.nan, x) if nans else x
    with torch.no_grad():
        assert torch.equal(network(x).nan_to_num(99.0), pool(x).nan_to_num(99.0))


@pytest.mark.usefixtures("level")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(1, 150),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 3),
    dense=st.booleans(),
)
def test_mean(channels: int, size: tuple[int, int], batch: int, dense: bool) -> None:
    """Of maps with room behind the channels, and of dense ones behind a max-pool."""
    torch.manual_seed(0)  # of every example: what fails once fails again
    pool = nn.MaxPool2d(3, 1, 1) if dense else nn.Identity()
    layers = [
        *unit(5, channels, 1),
        *unit(channels, channels, 1),
        pool,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model, x = nn.Sequential(*layers).eval(), torch.randn(batch, 5, *size)
    network = segmented(model, x)[0]
    assert any(int(kind) == 2 for s in segments(network) for kind in s.program[10:].view(-1, 26)[:, 0])
    assert error(network, model, x) < TOLERANCE
