"""First layers read an image's planes as they lie: the same numbers as torch in float64, whatever the width and the window."""

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
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    colours=st.integers(1, 5),
    outputs=st.one_of(st.integers(1, 8), st.integers(17, 24), st.integers(33, 50)),
    window=st.sampled_from([(3, 1, 1), (3, 2, 1), (3, 2, 0), (5, 2, 2), (1, 2, 0), ((3, 5), (1, 2), (0, 3))]),
    size=st.tuples(st.integers(5, 40), st.one_of(st.integers(16, 24), st.integers(31, 99))),
    activation=st.sampled_from([nn.ReLU6, nn.Hardswish, nn.Identity]),
    threads=st.integers(1, 2),
)
def test_planes(
    colours: int,
    outputs: int,
    window: tuple[int, int, int],
    size: tuple[int, int],
    activation: type[nn.Module],
    threads: int,
) -> None:
    torch.manual_seed(0)
    kernel, stride, padding = window
    stem = [nn.Conv2d(colours, outputs, kernel, stride, padding), activation()]
    model = nn.Sequential(*stem, *unit(outputs, 7, 1), *unit(7, 3)).eval()
    x = torch.randn(2, colours, *size)
    network = segmented(model, x)[0]
    assert segments(network)
    try:
        torch.set_num_threads(threads)
        for given_x in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x[:, :, :, torch.arange(size[1])],
        ):
            assert error(network, model, given_x) < TOLERANCE
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_no_number_reaches_its_windows_only(value: float) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 17, 3, 2, 1), nn.ReLU(), nn.Conv2d(17, 17, 1, groups=17), nn.Conv2d(17, 9, 1)
    )
    x = torch.randn(1, 3, 40, 70)
    x[0, 1, 20, 33] = value
    with torch.no_grad():
        expected = model.eval()(x).isfinite()
        assert not expected.all()
        assert torch.equal(segmented(model, x)[0](x).isfinite(), expected)
