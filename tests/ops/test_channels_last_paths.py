"""The kernels for channels-last tensors: 1x1 products, depthwise 3x3, long rows, runs of channels of a stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.ops import reference
from tests.ops.conv_cases import error

RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ACTIVATION = st.sampled_from(sorted(ops.ACTIVATIONS))
LAST = torch.channels_last


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: int,
    stride: int,
    padding: tuple[int, int],
    activation: str,
    stream: str,
    generator: torch.Generator,
) -> None:
    """Compares with the reference; ``stream``: none, same, or where the channels lie in wider tensors."""
    bias = torch.randn(weight.shape[0], generator=generator)
    in_index = out_index = residual = None
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    if stream in ("runs", "scattered"):
        wide = torch.randn(x.shape[0], inputs + 9, *x.shape[2:], generator=generator)
        in_index = (
            torch.arange(inputs) + 4
            if stream == "runs"
            else torch.randperm(inputs + 9)[:inputs].sort().values
        )
        x = wide
    if stream != "none":
        size = [
            (s + 2 * p - k) // stride + 1
            for s, p, k in zip(x.shape[2:], padding, weight.shape[2:], strict=True)
        ]
        extra = 0 if stream == "same" else 7
        residual = torch.randn(x.shape[0], outputs + extra, *size, generator=generator).to(memory_format=LAST)
        if extra:
            out_index = torch.arange(outputs) + 3
    if stream == "scattered":
        out_index = torch.randperm(outputs + 7)[:outputs]
    x = x.to(memory_format=LAST)
    arguments = (in_index, out_index, list(weight.shape), stride, padding, 1, groups, activation)
    packed = ops.pack_conv2d_weight(weight, groups)
    before = None if residual is None else residual.clone()
    y = ops.compact_conv2d(x, packed, bias, residual, *arguments)
    double = [None if t is None else t.double() for t in (x, packed, bias, residual)]
    pairs = [list(arguments[3:4]) * 2, list(padding), [1, 1]]
    expected = reference.compact_conv2d(*double, *arguments[:3], *pairs, *arguments[6:])
    assert y.shape == expected.shape
    assert error(y, expected) < 2e-5
    if residual is not None:
        assert torch.equal(residual, before)


STREAMS = st.sampled_from(["none", "same", "runs", "scattered"])


@given(
    batch=st.integers(0, 3),
    inputs=st.sampled_from([1, 3, 16, 37, 70]),
    outputs=st.sampled_from([1, 5, 8, 9, 16, 31, 33, 48, 67]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    activation=ACTIVATION,
    stream=STREAMS,
    seed=st.integers(0, 99),
)
@RELAXED
def test_pointwise(
    target: torch.device,
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    activation: str,
    stream: str,
    seed: int,
) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, inputs, *size, generator=generator)
    weight = torch.randn(outputs, inputs, 1, 1, generator=generator)
    check(x, weight, 1, 1, (0, 0), activation, stream, generator)


@pytest.mark.parametrize("stream", ["none", "same", "runs"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("outputs", [127, 131, 145, 160])
def test_pointwise_threads_share_outputs(
    target: torch.device, outputs: int, activation: str, stream: str
) -> None:
    """More outputs than pixels: a thread computes some of the outputs of every pixel."""
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(2, 70, 5, 7, generator=generator)
    weight = torch.randn(outputs, 70, 1, 1, generator=generator)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(x, weight, 1, 1, (0, 0), activation, stream, torch.Generator().manual_seed(0))
    finally:
        torch.set_num_threads(before)


@given(
    batch=st.integers(0, 3),
    channels=st.sampled_from([2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 37, 70]),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    side=st.sampled_from([3, 3, 5, 7]),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    activation=ACTIVATION,
    stream=STREAMS,
    seed=st.integers(0, 99),
)
@RELAXED
def test_depthwise(
    target: torch.device,
    batch: int,
    channels: int,
    size: tuple[int, int],
    side: int,
    stride: int,
    padding: tuple[int, int],
    activation: str,
    stream: str,
    seed: int,
) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(s, side - 2 * p) for s, p in zip(size, padding, strict=True))
    x = torch.randn(batch, channels, height, width, generator=generator)
    weight = torch.randn(channels, 1, side, side, generator=generator)
    check(x, weight, channels, stride, padding, activation, stream, generator)


@given(
    batch=st.integers(1, 3),
    inputs=st.sampled_from([1, 3, 16, 37]),
    outputs=st.sampled_from([1, 5, 8, 9, 16, 31, 33, 48, 67]),
    size=st.tuples(st.integers(1, 9), st.integers(12, 31)),
    kernel=st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 3, 5])),
    stride=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    activation=ACTIVATION,
    stream=STREAMS,
    seed=st.integers(0, 99),
)
@RELAXED
def test_long_rows(
    target: torch.device,
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    activation: str,
    stream: str,
    seed: int,
) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(s, k - 2 * p) for s, k, p in zip(size, kernel, padding, strict=True))
    x = torch.randn(batch, inputs, height, width, generator=generator)
    weight = torch.randn(outputs, inputs, *kernel, generator=generator)
    check(x, weight, 1, stride, padding, activation, stream, generator)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_maps_larger_than_the_cache(target: torch.device, stride: int) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(stride)
    x = torch.randn(5, 101, 57, 58, generator=generator)  # 6.7 MB, and what is written
    weight = torch.randn(101, 1, 3, 3, generator=generator)
    check(x, weight, 101, stride, (1, 1), "relu6", "same", generator)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [(1, 5), (5, 1), (1, 1)])
def test_a_single_channel_has_no_memory_format(
    target: torch.device, channels: tuple[int, int], kernel: int
) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    generator = torch.Generator().manual_seed(kernel)
    inputs, outputs = channels
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
    pad = kernel // 2
    for x in (
        torch.randn(2, inputs, 9, 17, generator=generator),
        torch.randn(2, 9, 17, inputs).movedim(3, 1),
    ):
        bias, residual = torch.randn(outputs), torch.randn(2, outputs, 9, 17)
        packed = ops.pack_conv2d_weight(weight)
        y = ops.compact_conv2d(
            x, packed, bias, residual, None, None, list(weight.shape), 1, pad, 1, 1, "relu"
        )
        double = (x.double(), weight.double(), bias.double())
        exact = (torch.nn.functional.conv2d(*double, padding=pad) + residual.double()).relu()
        assert error(y, exact) < 2e-5


def test_nan_passes_every_activation(target: torch.device) -> None:
    if target.type == "cuda":
        pytest.skip("a path of the CPU kernels")
    x = torch.full((1, 16, 4, 4), float("nan")).to(memory_format=LAST)
    for weight, groups in ((torch.ones(16, 16, 1, 1), 1), (torch.ones(16, 1, 3, 3), 16)):
        packed = ops.pack_conv2d_weight(weight, groups)
        for activation in sorted(set(ops.ACTIVATIONS) - {"hardswish"}):
            y = ops.compact_conv2d(
                x, packed, None, None, None, None, list(weight.shape), 1, 0, 1, groups, activation
            )
            assert y.isnan().all(), activation
