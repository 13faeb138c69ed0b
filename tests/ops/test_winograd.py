"""Winograd convolution: against the reference over ragged widths and edges, and its accuracy against float64."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import ops
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops import reference
from lightning_prune.ops.winograd import algorithm_for, transform_matrix, transform_weight
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
CHANNELS = st.sampled_from([1, 2, 3, 8, 13, 16, 17, 29, 31, 32, 33, 37, 48, 50, 64, 90])
ALGORITHMS = ("direct", "winograd2", "winograd4")
CASES = [("winograd2", 3), ("winograd4", 3), ("winograd2", 5)]


@given(
    data=st.data(),
    algorithm=st.sampled_from(CASES),
    dilation=st.tuples(st.sampled_from([1, 1, 2, 3]), st.sampled_from([1, 1, 2, 3])),
    batch=st.sampled_from([0, 1, 2, 5]),
    inputs=CHANNELS,
    outputs=CHANNELS,
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_the_reference(
    target: torch.device,
    data: st.DataObject,
    algorithm: tuple[str, int],
    dilation: tuple[int, int],
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    if target.type == "cuda":
        pytest.skip("Winograd weights are packed on the CPU")
    check_drawn(data, algorithm, batch, inputs, outputs, size, 1, padding, dilation)


@pytest.mark.parametrize(("algorithm", "kernel"), CASES)
def test_packed_is_the_direct_layout_and_the_transform(algorithm: str, kernel: int) -> None:
    weight = torch.randn(21, 13, kernel, kernel)
    packed = ops.pack_conv2d_weight(weight, 1, algorithm)
    expected = reference.pack_conv2d_weight(weight, 1, algorithm)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(ops.unpack_conv2d_weight(packed, weight.shape), weight)
    tile = int(algorithm[-1])
    points = tile + kernel - 1
    tail = packed[reference.packed_size(weight.shape, 1) :]
    transformed = ops.unpack_conv2d_weight(tail, (21, 13, points, points))
    torch.testing.assert_close(transformed, transform_weight(weight, tile), rtol=1e-6, atol=1e-7)
    assert transform_matrix(tile, kernel).shape == (points, kernel)


def test_half_storage(target: torch.device) -> None:
    """Maps and transformed weights in half types: what storing costs is what rounding the exact result costs."""
    if target.type == "cuda":
        pytest.skip("Winograd weights are packed on the CPU")
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.bfloat16, 5e-3), (torch.float16, 7e-4)):
        x = torch.randn(3, 70, 13, 14, generator=generator).to(dtype).to(memory_format=torch.channels_last)
        weight = (torch.randn(37, 70, 3, 3, generator=generator) / 25).to(dtype)
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        for algorithm, stored in (("winograd4", torch.float32), ("winograd2", dtype), ("auto", dtype)):
            packed = ops.pack_conv2d_weight(weight, 1, algorithm)
            assert packed.dtype == torch.float32
            y = ops.compact_conv2d(x, packed.to(stored), None, None, None, None, [37, 70, 3, 3], 1, 1)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert (y.double() - exact).abs().max() < bound * exact.abs().max(), algorithm
        assert torch.equal(packed, ops.pack_conv2d_weight(weight, 1, "winograd2"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 64, 700])
def test_accuracy(target: torch.device, kind: str, channels: int) -> None:
    if target.type == "cuda":
        pytest.skip("Winograd weights are packed on the CPU")
    for algorithm, kernel in CASES:
        for weights in WEIGHTS.get(kind, ("normal", "alternating")):
            check_accuracy(AccuracyCase(kind, weights, channels, 24, kernel), algorithm)


@pytest.mark.parametrize(("algorithm", "kernel"), CASES)
def test_it_is_taken(target: torch.device, algorithm: str, kernel: int) -> None:
    """A result is a number only if the other part of the packed weight was not read."""
    if target.type == "cuda":
        pytest.skip("Winograd weights are packed on the CPU")
    weight = torch.randn(20, 18, kernel, kernel)
    packed, shape = ops.pack_conv2d_weight(weight, 1, algorithm), list(weight.shape)
    transform, direct = only_transform(packed, weight.shape), only_direct(packed, weight.shape)
    pad, x = kernel // 2, torch.randn(1, 18, 12, 12)
    index = torch.randperm(18)
    for last in (False, True):
        maps = x.to(memory_format=torch.channels_last) if last else x
        for reads, dtype, dilation in (
            (None, torch.float32, 1),
            (index, torch.float32, 1),
            (None, torch.bfloat16, 1),
            (None, torch.float32, 2),
        ):
            given = (None, None, reads, None, shape, 1, pad * dilation, dilation)
            assert ops.compact_conv2d(maps.to(dtype), transform, *given).isfinite().all()
            assert ops.compact_conv2d(maps.to(dtype), direct, *given).isnan().any()
    # other strides, tiles that would be mostly padding, fewer than four tiles, float64
    few = x[:, :, :2, :2]
    for maps, stride, padding, dilation in (
        (x, 2, pad, 1),
        (x, (2, 1), pad, 1),
        (few, 1, pad, 1),
        (x[:, :, :7, :7], 1, 7 * pad, 7),
    ):
        given = (None, None, None, None, shape, stride, padding, dilation)
        assert ops.compact_conv2d(maps, direct, *given).isfinite().all()
    assert (
        ops.compact_conv2d(x.double(), direct.double(), None, None, None, None, shape, 1, pad)
        .isfinite()
        .all()
    )


def test_special_values_stay_in_reach() -> None:
    # A tile shares its inputs: NaN may reach the other pixels of a 4x4 tile, never those of another tile.
    x = torch.zeros(1, 16, 12, 12).to(memory_format=torch.channels_last)
    x[0, 3, 5, 5] = float("nan")
    packed = ops.pack_conv2d_weight(torch.ones(16, 16, 3, 3), 1, "winograd4")
    y = ops.compact_conv2d(x, packed, None, None, None, None, [16, 16, 3, 3], 1, 1, activation="relu")
    assert y[0, :, 4:7, 4:7].isnan().all()
    assert not y[0, :, 8:].isnan().any()
    assert not y[0, :, :, 8:].isnan().any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(1, 70, 150, 5, 7), (1, 30, 33, 33, 31), (5, 20, 37, 14, 12)])
def test_threads_do_not_change_the_numbers(
    target: torch.device, algorithm: str, shape: tuple[int, ...]
) -> None:
    if target.type == "cuda":
        pytest.skip("threads of the CPU kernels")
    batch, inputs, outputs, height, width = shape
    x = torch.randn(batch, inputs, height, width).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3) / 20
    packed = ops.pack_conv2d_weight(weight, 1, algorithm)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.compact_conv2d(x, packed, None, None, None, None, list(weight.shape), 1, 1))
    finally:
        torch.set_num_threads(before)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert all(error(y, exact) < 2e-5 for y in results)


def test_few_tiles_of_a_large_weight_take_the_small_tile() -> None:
    conv = nn.Conv2d(512, 512, 3, padding=1)
    assert algorithm_for(conv.weight.shape, 1, 7, 7) == "winograd2"
    assert algorithm_for(conv.weight.shape, 8, 7, 7) == algorithm_for((64, 64, 3, 3), 1, 7, 7) == "auto"
    module = CompactConv2d.from_conv(conv, algorithm="winograd2", backend="own")
    x = torch.randn(1, 512, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(module(x), conv(x), rtol=1e-4, atol=1e-5)
    assert "algorithm=winograd2" in repr(module)
    if ops.extension_available():
        assert module.packed.numel() == conv.weight.numel() * 25 // 9
    assert module.double().packed.numel() == conv.weight.numel()
    strided = CompactConv2d.from_conv(nn.Conv2d(16, 16, 3, stride=2), algorithm="winograd4")
    assert strided.packed.numel() == 16 * 16 * 9
    with pytest.raises(ValueError, match=r"algorithm must be auto, direct, winograd2, .* or None; got 'fft'"):
        CompactConv2d([4, 4, 3, 3], algorithm="fft")


def test_algorithm_is_checked() -> None:
    errors = (ValueError, RuntimeError)
    with pytest.raises(errors, match="one of auto, direct, winograd2, .*, tensor_core; got 'fft'"):
        ops.pack_conv2d_weight(torch.zeros(2, 2, 3, 3), 1, "fft")
    with pytest.raises(errors, match=r"takes float32 or half weights .* of shape \(O, C, k, k\)"):
        ops.pack_conv2d_weight(torch.zeros(2, 2, 1, 3), 1, "winograd2")
    for kernel, name in (
        (5, "winograd4"),
        (5, "winograd5_stride2"),
        (3, "winograd3_stride2"),
        (7, "winograd2"),
    ):
        with pytest.raises(errors, match=rf"{name}.*3 for winograd4 .*, 7 for winograd3_stride2; got"):
            ops.pack_conv2d_weight(torch.zeros(2, 2, kernel, kernel), 1, name)
    with pytest.raises(errors, match="with groups=2"):
        ops.pack_conv2d_weight(torch.zeros(2, 2, 3, 3), 2, "winograd4")


def test_other_strides_and_types_use_the_direct_weights() -> None:
    weight, x = torch.randn(16, 16, 3, 3), torch.randn(1, 16, 9, 9)
    packed = {a: ops.pack_conv2d_weight(weight, 1, a) for a in ("direct", "winograd4")}
    # Stride 2, tiles that would be mostly padding, float64.
    for maps, stride, padding, dilation in ((x, 2, 1, 1), (x, 1, 7, 7), (x[:, :, :3, :3], 1, 0, 1)):
        results = [
            ops.compact_conv2d(maps, p, None, None, None, None, [16, 16, 3, 3], stride, padding, dilation)
            for p in packed.values()
        ]
        assert torch.equal(*results)
    double = [
        ops.compact_conv2d(x.double(), p.double(), None, None, None, None, [16, 16, 3, 3], 1, 1)
        for p in packed.values()
    ]
    assert torch.equal(*double)


def test_module_packs_again_and_saves_the_plain_weight() -> None:
    conv = nn.Conv2d(16, 24, 3, padding=1)
    fast, exact = CompactConv2d.from_conv(conv), CompactConv2d.from_conv(conv, exact=True)
    x = torch.randn(1, 16, 9, 9)
    plain = reference.packed_size(conv.weight.shape, 1)
    assert exact.packed.numel() == plain
    assert "exact=True" in repr(exact)
    assert torch.equal(fast.weight, exact.weight)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    assert buffer.tell() < 4 * plain + 4096
    buffer.seek(0)
    fresh = CompactConv2d([24, 16, 3, 3], padding=1)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), fast(x))
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    fast.load_state_dict(exact.state_dict())
    there_and_back = copy.deepcopy(fast).double().float()
    assert torch.equal(there_and_back(x), fast(x))
    if ops.extension_available():
        assert fast.packed.numel() == 5 * plain
        assert copy.deepcopy(fast).bfloat16().packed.numel() == plain * 25 // 9
        assert copy.deepcopy(fast).double().packed.numel() == plain


@pytest.mark.parametrize("algorithm", ["auto", "winograd2"])
def test_opcheck(algorithm: str) -> None:
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    weight = torch.randn(13, 12, 3, 3)
    torch.library.opcheck(OP.pack_conv2d_weight, (weight, 1, algorithm))
    packed = OP.pack_conv2d_weight(weight, 1, algorithm)
    x = torch.randn(2, 12, 8, 8)
    arguments = (x, packed, None, None, None, None, [13, 12, 3, 3], [1, 1], [1, 1], [1, 1], 1, "relu")
    torch.library.opcheck(OP.compact_conv2d, arguments)
