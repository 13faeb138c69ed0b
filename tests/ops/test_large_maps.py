"""Maps beyond the caches: what is fetched ahead and what is written past them changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import conv2d

from lightning_prune import ops
from lightning_prune.ops.winograd import algorithm_for
from tests.ops.conv_cases import error

LAST = torch.channels_last


@dataclass(frozen=True)
class Case:
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    batch: int = 1


CASES = {
    "1x1, whole lines of 18 MB": Case(24, 48, 310, 309),
    "1x1, 17 MB of ragged pixels": Case(9, 40, 330, 329),
    "Strassen": Case(97, 64, 60, 61),
    "Strassen, few images of few pixels": Case(300, 70, 21, 22, batch=3),
    "Winograd": Case(61, 33, 71, 73, 3),
    "Winograd, dilated": Case(64, 19, 70, 75, 3, dilation=2),
    "Winograd, stride 2": Case(64, 48, 69, 71, 3, stride=2, batch=2),
    "Winograd, 5x5": Case(67, 18, 66, 67, 5),
    "depthwise": Case(71, 71, 91, 90, 3, groups=71),
    "depthwise, whole vectors": Case(64, 64, 56, 58, 3, groups=64, batch=4),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_large_maps(target: torch.device, threads: int, name: str) -> None:
    if target.type == "cuda":
        pytest.skip("paths of the CPU kernels")
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    pad = case.dilation * (case.kernel // 2)
    x = torch.randn(case.batch, case.inputs, case.height, case.width, generator=generator)
    weight = torch.randn(
        case.outputs, case.inputs // case.groups, case.kernel, case.kernel, generator=generator
    )
    bias = torch.randn(case.outputs, generator=generator)
    settings = (case.stride, pad, case.dilation, case.groups)
    exact = conv2d(x.double(), weight.double(), bias.double(), *settings)
    residual = torch.randn(exact.shape, generator=generator).to(memory_format=LAST)
    x = x.to(memory_format=LAST)
    algorithm = (
        algorithm_for(weight.shape, case.batch, *exact.shape[2:], case.stride)
        if case.groups == 1
        else "direct"
    )
    packed = ops.pack_conv2d_weight(weight, case.groups, algorithm)
    for activation, added in (("relu", None), ("silu", None), ("none", residual)):
        y = ops.compact_conv2d(x, packed, bias, added, None, None, list(weight.shape), *settings, activation)
        full = exact if added is None else exact + added.double()
        expected = {"relu": torch.relu, "silu": torch.nn.functional.silu, "none": torch.clone}[activation](
            full
        )
        assert y.is_contiguous(memory_format=LAST)
        assert error(y, expected) < 2e-5, activation


def test_part_of_a_stream_of_whole_lines(target: torch.device) -> None:
    """Outputs that begin within a line of the map, and those that begin with one, in maps that are written past the caches."""
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 280, 281, generator=generator).to(memory_format=LAST)
    weight, bias = torch.randn(64, 8, 1, 1, generator=generator), torch.randn(64, generator=generator)
    stream = torch.randn(1, 96, 280, 281, generator=generator).to(memory_format=LAST)
    packed = ops.pack_conv2d_weight(weight)
    for first in (16, 21):
        index = torch.arange(64) + first
        y = ops.compact_conv2d(x, packed, bias, stream, None, index, list(weight.shape), 1, 0, 1, 1, "relu")
        expected = stream.double()
        expected[:, index] += conv2d(x.double(), weight.double(), bias.double())
        assert error(y, expected.relu()) < 2e-5
