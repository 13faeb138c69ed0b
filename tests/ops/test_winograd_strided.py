"""Winograd convolution of stride 2: against the reference over ragged widths and edges, its accuracy, and when it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import ops
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops import reference
from lightning_prune.ops.winograd import (
    STRIDED,
    TRANSFORMED,
    algorithm_for,
    strided_default,
    transform_weight,
    winograd_products,
)
from tests.ops.accuracy_cases import (
    KINDS,
    WEIGHTS,
    AccuracyCase,
    check_accuracy,
    only_direct,
    only_transform,
)
from tests.ops.conv_cases import check_drawn, error

OP = torch.ops.lightning_prune
CASES = [
    (name, kernel) for name, (tile, kernels) in TRANSFORMED.items() if tile > STRIDED for kernel in kernels
]


@pytest.fixture(autouse=True)
def on_the_cpu(target: torch.device) -> None:
    if target.type == "cuda":
        pytest.skip("Winograd weights are packed on the CPU")


def strided(x: torch.Tensor, weight: torch.Tensor, algorithm: str, padding: int = 0) -> torch.Tensor:
    packed = ops.pack_conv2d_weight(weight, 1, algorithm)
    return ops.compact_conv2d(x, packed, None, None, None, None, list(weight.shape), 2, padding)


@given(
    data=st.data(),
    case=st.sampled_from(CASES),
    batch=st.sampled_from([0, 1, 2, 5]),
    inputs=st.sampled_from([1, 2, 3, 4, 5, 13, 16, 17, 31, 33, 50]),
    outputs=st.sampled_from([1, 8, 13, 16, 17, 31, 37, 48, 64]),
    size=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_the_reference(
    data: st.DataObject,
    case: tuple[str, int],
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    check_drawn(data, case, batch, inputs, outputs, size, 2, padding, (1, 1))


@pytest.mark.parametrize(("algorithm", "kernel"), CASES)
@pytest.mark.parametrize("channels", [3, 13])
def test_packed_is_the_direct_layout_and_the_transform(algorithm: str, kernel: int, channels: int) -> None:
    weight = torch.randn(21, channels, kernel, kernel)
    packed = ops.pack_conv2d_weight(weight, 1, algorithm)
    torch.testing.assert_close(
        packed, reference.pack_conv2d_weight(weight, 1, algorithm), rtol=1e-6, atol=1e-7
    )
    assert torch.equal(ops.unpack_conv2d_weight(packed, weight.shape), weight)
    tile = TRANSFORMED[algorithm][0]
    transformed = transform_weight(weight, tile)
    tail = packed[reference.packed_size(weight.shape, 1) :]
    torch.testing.assert_close(
        ops.unpack_conv2d_weight(tail, transformed.shape), transformed, rtol=1e-6, atol=1e-7
    )
    assert transformed.numel() == 21 * channels * winograd_products(kernel, channels, tile)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 64, 700])
def test_accuracy(kind: str, channels: int) -> None:
    for algorithm, kernel in CASES:
        size = 62 if algorithm == "winograd5_stride2" else 42
        for weights in WEIGHTS.get(kind, ("normal", "alternating", "phases")):
            check_accuracy(AccuracyCase(kind, weights, channels, 16, kernel, 2, size), algorithm)


@pytest.mark.parametrize(("algorithm", "kernel"), CASES)
@pytest.mark.parametrize("channels", [3, 18])
def test_it_is_taken(algorithm: str, kernel: int, channels: int) -> None:
    """A result is a number only if the other part of the packed weight was not read."""
    weight = torch.randn(20, channels, kernel, kernel)
    packed, shape = ops.pack_conv2d_weight(weight, 1, algorithm), list(weight.shape)
    transform, direct = only_transform(packed, weight.shape), only_direct(packed, weight.shape)
    x, pad, index = torch.randn(1, channels, 60, 60), kernel // 2, torch.randperm(channels)
    for last in (False, True):
        maps = x.to(memory_format=torch.channels_last) if last else x
        for reads, dtype in ((None, torch.float32), (index, torch.float32), (None, torch.bfloat16)):
            given = (None, None, reads, None, shape, 2, pad)
            assert ops.compact_conv2d(maps.to(dtype), transform, *given).isfinite().all()
            assert ops.compact_conv2d(maps.to(dtype), direct, *given).isnan().any()
    # few tiles, other strides, dilation, float64
    few = x[:, :, :9, :9]
    for maps, stride, dilation in ((few, 2, 1), (x, 1, 1), (x, (2, 1), 1), (x, 2, 2)):
        given = (None, None, None, None, shape, stride, pad * dilation, dilation)
        assert ops.compact_conv2d(maps, direct, *given).isfinite().all()
    given = (None, None, None, None, shape, 2, pad)
    assert ops.compact_conv2d(x.double(), direct.double(), *given).isfinite().all()


@pytest.mark.parametrize(("algorithm", "kernel"), CASES)
@pytest.mark.parametrize("channels", [3, 16])
def test_special_values_stay_in_reach(algorithm: str, kernel: int, channels: int) -> None:
    # A tile shares its inputs: NaN may reach the other pixels of a tile that reads it, never those of another tile.
    side = TRANSFORMED[algorithm][0] - STRIDED
    weight = torch.ones(24, channels, kernel, kernel)
    for at in range(6, 40, 3):
        x = torch.zeros(1, channels, 60, 60).to(memory_format=torch.channels_last)
        x[0, 1, at, at + 1] = float("nan")
        reached = strided(x, weight, algorithm)[0, 0].isnan()
        exact = F.conv2d(x, weight, stride=2)[0, 0].isnan()
        assert reached[exact].all()
        tiles = F.max_pool2d(exact[None].float(), side, side, ceil_mode=True)
        allowed = tiles.repeat_interleave(side, 1).repeat_interleave(side, 2)[0, : len(exact), : len(exact)]
        assert not reached[allowed == 0].any()


@pytest.mark.parametrize(("algorithm", "kernel"), CASES)
@pytest.mark.parametrize("channels", [3, 20])
def test_threads_do_not_change_the_numbers(algorithm: str, kernel: int, channels: int) -> None:
    x = torch.randn(3, channels, 41, 38).to(memory_format=torch.channels_last)
    weight = torch.randn(37, channels, kernel, kernel) / 20
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(strided(x, weight, algorithm, 1))
    finally:
        torch.set_num_threads(before)
    exact = F.conv2d(x.double(), weight.double(), stride=2, padding=1)
    assert all(error(y, exact) < 2e-5 for y in results)


def test_the_tile_is_the_one_with_the_fewest_multiplications() -> None:
    assert algorithm_for((77, 37, 3, 3), 1, 28, 28, 2) == "winograd4_stride2"
    assert algorithm_for((256, 128, 3, 3), 8, 14, 14, 2) == "winograd5_stride2"
    assert algorithm_for((77, 37, 5, 5), 1, 28, 28, 2) == "winograd4_stride2"
    assert algorithm_for((37, 3, 7, 7), 1, 112, 112, 2) == "winograd3_stride2"
    # Few tiles for a large weight, few channels, kernels without a transform.
    assert algorithm_for((256, 128, 3, 3), 1, 7, 7, 2) == "direct"
    assert algorithm_for((128, 64, 3, 3), 1, 14, 14, 2) == "direct"
    assert (
        algorithm_for((13, 13, 3, 3), 8, 56, 56, 2)
        == algorithm_for((64, 1, 7, 7), 1, 112, 112, 2)
        == "direct"
    )
    assert (
        algorithm_for((64, 64, 1, 1), 8, 56, 56, 2) == algorithm_for((64, 64, 3, 5), 8, 56, 56, 2) == "direct"
    )
    assert strided_default((512, 256, 3, 3)) == strided_default((64, 64, 1, 1)) == "direct"


def test_module_takes_it_where_it_applies() -> None:
    conv = nn.Conv2d(24, 32, 3, stride=2, padding=1)
    fast, exact = CompactConv2d.from_conv(conv), CompactConv2d.from_conv(conv, exact=True)
    plain = reference.packed_size(conv.weight.shape, 1)
    assert exact.packed.numel() == plain
    x = torch.randn(2, 24, 33, 30)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), conv(x), rtol=1e-4, atol=1e-5)
    if ops.extension_available():
        assert fast.packed.numel() == plain + conv.weight.numel() * 81 // 9
        assert fast.state_dict()["packed"].numel() == plain
    for other in (fast.double(), fast.bfloat16()):
        assert other.packed.numel() == plain
    dilated = CompactConv2d.from_conv(nn.Conv2d(24, 32, 3, stride=2, dilation=2))
    oblong = CompactConv2d.from_conv(nn.Conv2d(24, 32, 3, stride=(2, 1)), algorithm="winograd4_stride2")
    assert dilated.packed.numel() == oblong.packed.numel() == plain


def test_few_tiles_and_other_strides_use_the_direct_weights() -> None:
    weight, x = torch.randn(16, 16, 3, 3), torch.randn(1, 16, 21, 21)
    packed = [ops.pack_conv2d_weight(weight, 1, a) for a in ("direct", "winograd4_stride2")]
    for maps, stride, dilation in ((x[:, :, :13, :13], 2, 1), (x, 1, 1), (x, (2, 1), 1), (x, 2, 2)):
        results = [
            ops.compact_conv2d(maps, p, None, None, None, None, [16, 16, 3, 3], stride, 1, dilation)
            for p in packed
        ]
        assert torch.equal(*results)


def test_half_maps() -> None:
    x = torch.randn(2, 20, 40, 40).bfloat16().to(memory_format=torch.channels_last)
    weight = (torch.randn(24, 20, 3, 3) / 13).bfloat16()
    exact = F.conv2d(x.double(), weight.double(), stride=2, padding=1)
    y = strided(x, weight, "winograd4_stride2", 1)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() < 5e-3 * exact.abs().max()


@pytest.mark.parametrize(("algorithm", "kernel"), CASES)
def test_opcheck(algorithm: str, kernel: int) -> None:
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    weight = torch.randn(13, 3, kernel, kernel)
    torch.library.opcheck(OP.pack_conv2d_weight, (weight, 1, algorithm))
    packed = OP.pack_conv2d_weight(weight, 1, algorithm)
    x = torch.randn(2, 3, 40, 40)
    arguments = (
        x,
        packed,
        None,
        None,
        None,
        None,
        [13, 3, kernel, kernel],
        [2, 2],
        [1, 1],
        [1, 1],
        1,
        "relu",
    )
    torch.library.opcheck(OP.compact_conv2d, arguments)
