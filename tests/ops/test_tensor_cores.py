"""Weights and layouts of the tensor-core path on every device; on a GPU the kernels themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops import reference, tensor_cores
from tests.ops.conv_cases import error
from tests.ops.test_tensor_conv_emulation import BOUND, DTYPES, laid_out

RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.cuda)])
def target(request: pytest.FixtureRequest) -> torch.device:
    """Only a GPU: what a CPU can check of these kernels is in test_tensor_conv_emulation.py."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not ops.availability.cuda_built():
        pytest.fail("a CUDA device is visible but the extension was built without CUDA kernels")
    return torch.device(request.param)


def test_layout_holds_every_weight_once() -> None:
    weight = torch.arange(1.0, 5 * 11 * 6 + 1).view(5, 11, 2, 3)
    for lanes, mark in ((8, 1), (4, 2)):
        packed = tensor_cores.tensor_weight(weight, 1, lanes)
        assert packed.shape == (6 * 16 * 8 + mark,)
        assert torch.equal(packed[packed != 0].sort().values, weight.flatten())
        chunks = packed[:-mark].view(6, 16 // lanes, 8, lanes)
        for o, c, tap in [(0, 0, 0), (4, 10, 5), (2, 7, 3)]:
            assert chunks[tap, c // lanes, o, c % lanes] == weight[o, c, tap // 3, tap % 3]
    deep = torch.arange(1.0, 11 * 9 + 1).view(11, 1, 3, 3)
    behind = tensor_cores.tensor_weight(deep, 11, 8)
    assert not behind[:5].any()  # 99 elements of the direct layout, 5 to the next multiple of 8
    rows = behind[5:-1].view(9, 16)
    assert torch.equal(rows[:, :11], deep.view(11, 9).T)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 37, 5, 6), (37 * 30, 1, 37 * 6, 37), True),  # channels_last
        ((2, 37, 5, 6), (40 * 30, 1, 40 * 6, 40), True),  # with room behind the channels
        ((1, 37, 5, 6), (7, 1, 40 * 6, 40), True),  # the stride of a dimension of size 1 says nothing
        ((2, 37, 1, 1), (40, 1, 99, 99), True),
        ((2, 37, 1, 1), (37, 1, 1, 1), False),  # contiguous
        ((2, 37, 5, 6), (37 * 30, 30, 6, 1), False),
        ((2, 37, 5, 6), (40 * 60, 1, 40 * 6, 40), False),  # every other image
        ((2, 37, 5, 6), (32 * 30, 1, 32 * 6, 32), False),  # pixels overlap
        ((2, 1, 5, 6), (8 * 30, 3, 8 * 6, 8), True),
    ],
)
def test_rows_of_channels(shape: tuple[int, ...], strides: tuple[int, ...], expected: bool) -> None:
    x = torch.as_strided(torch.zeros(10_000), shape, strides)
    assert tensor_cores.rows_of_channels(x) is expected


def test_output_has_room_and_the_format_of_its_kind() -> None:
    y = tensor_cores.padded_output(torch.zeros(1), (2, 37, 5, 6))
    assert (y.shape, y.stride()) == ((2, 37, 5, 6), (40 * 30, 1, 240, 40))
    assert tensor_cores.rows_of_channels(y)
    whole = tensor_cores.padded_output(torch.zeros(1), (2, 40, 5, 6))
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_which_weights_carry_them() -> None:
    dense, deep = torch.zeros(3, 4, 3, 3), torch.zeros(4, 1, 3, 3)
    for weight, groups in ((dense, 1), (deep, 4), (dense.bfloat16(), 1)):
        assert tensor_cores.tensor_lanes(weight, groups, "auto") == 0  # on a CPU
        with pytest.raises(
            (ValueError, RuntimeError),
            match="'tensor_core' takes .* weights on CUDA",
        ):
            ops.pack_conv2d_weight(weight, groups, "tensor_core")


def test_what_was_packed_for_a_gpu_serves_a_cpu() -> None:
    weight, x = torch.randn(5, 11, 3, 3), torch.randn(2, 11, 6, 6)
    direct = reference.pack_conv2d_weight(weight)
    for lanes in (4, 8):
        packed = torch.cat([direct, tensor_cores.tensor_weight(weight, 1, lanes)])
        assert torch.equal(ops.unpack_conv2d_weight(packed, weight.shape), weight)
        y = ops.compact_conv2d(x, packed, None, None, None, None, weight.shape, 1, 1)
        assert torch.equal(y, ops.compact_conv2d(x, direct, None, None, None, None, weight.shape, 1, 1))


@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    channels=st.sampled_from(
        [(1, 8), (3, 37), (37, 41), (101, 64), (64, 128), (40, 5), (13, -1), (37, -1), (64, -1)]
    ),
    size=st.tuples(st.integers(3, 19), st.integers(3, 19)),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    layout=st.sampled_from(["padded", "last", "first"]),
    extra=st.sampled_from(["none", "residual", "scatter", "gather"]),
    activation=st.sampled_from(sorted(ops.ACTIVATIONS)),
    seed=st.integers(0, 99),
)
@RELAXED
def test_kernels_against_float64(
    target: torch.device,
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: int,
    stride: int,
    dilation: int,
    layout: str,
    extra: str,
    activation: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, groups = (*channels, 1) if channels[1] > 0 else (channels[0], channels[0], channels[0])
    padding = dilation * (kernel - 1) // 2 + 1

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = (randn(outputs, inputs // groups, kernel, kernel) / (inputs // groups * kernel**2) ** 0.5).to(
        target
    )
    packed = ops.pack_conv2d_weight(weight, groups, "tensor_core")
    assert torch.equal(packed, reference.pack_conv2d_weight(weight, groups, "tensor_core"))
    # Spare lanes hold NaN: nothing of them may reach a result.
    x = laid_out(randn(batch, inputs + 5 * (extra == "gather"), *size).to(target), layout)
    index = torch.randperm(x.shape[1], generator=generator)[:inputs].to(target) if extra == "gather" else None
    place = (weight.shape, [stride] * 2, [padding] * 2, [dilation] * 2, groups)
    exact = reference.pack_conv2d_weight(weight.double(), groups)
    bias = randn(outputs).to(target)
    plain = reference.compact_conv2d(x.double(), exact, None, None, index, None, *place)
    residual = scatter = None
    if extra in ("residual", "scatter"):
        width = outputs + 6 * (extra == "scatter")
        residual = laid_out(randn(batch, width, *plain.shape[2:]).to(target), layout)
        scatter = (
            torch.randperm(width, generator=generator)[:outputs].to(target) if extra == "scatter" else None
        )
    packed = packed.to(dtype)
    y = ops.compact_conv2d(x, packed, bias, residual, index, scatter, *place, activation)
    doubles = [None if t is None else t.double() for t in (bias, residual)]
    expected = reference.compact_conv2d(x.double(), exact, *doubles, index, scatter, *place, activation)
    assert y.shape == expected.shape
    assert error(y, expected) < (1e-5 if groups > 1 and dtype == torch.float32 else BOUND[dtype])
    if tensor_cores.rows_of_channels(x):
        assert y.stride() == tensor_cores.padded_output(x, tuple(y.shape)).stride()
    again = ops.compact_conv2d(x, packed, bias, residual, index, scatter, *place, activation)
    assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", range(29))
def test_every_tile_and_split(
    target: torch.device, tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = torch.nn.Conv2d(101, 133, 3, padding=1).to(target, dtype).eval()
    module = CompactConv2d.from_conv(conv, None, "relu", backend="own")
    x = torch.randn(3, 101, 20, 17, device=target).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = torch.relu(F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1))
        for splits in (1, 2, 7):
            monkeypatch.setenv("LIGHTNING_PRUNE_CUDA_TILE", f"{tile}:{splits}")
            assert error(module(x), expected) < BOUND[dtype], splits


def test_a_chain_of_modules_stays_in_rows_and_is_captured(target: torch.device) -> None:
    torch.manual_seed(0)
    convs = [torch.nn.Conv2d(c, k, 3, padding=1) for c, k in ((3, 37), (37, 101), (101, 13))]
    model = torch.nn.Sequential(
        *(CompactConv2d.from_conv(c.to(target, torch.bfloat16), None, "relu", backend="own") for c in convs)
    )
    x = torch.randn(2, 3, 9, 9, device=target).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        assert tensor_cores.rows_of_channels(expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, model(x))
        assert not torch.equal(y, expected)


def test_strict_float32_stays_exact(target: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    conv = torch.nn.Conv2d(64, 37, 3, padding=1).to(target).eval()
    x = torch.randn(2, 64, 9, 9, device=target)
    with torch.no_grad():
        exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        assert error(CompactConv2d.from_conv(conv, exact=True, backend="own")(x), exact) < 1e-5
        assert error(CompactConv2d.from_conv(conv, backend="own")(x), exact) < BOUND[torch.float32]


@pytest.mark.parametrize("layout", ["padded", "last", "first"])
def test_fake_kernels_know_the_layout(target: torch.device, layout: str) -> None:
    weight = torch.randn(41, 37, 3, 3, device=target).bfloat16()
    packed = ops.pack_conv2d_weight(weight, 1, "auto").bfloat16()
    x = laid_out(torch.randn(2, 37, 9, 9, device=target).bfloat16(), layout)
    place = ([1, 1], [1, 1], [1, 1], 1, "relu")
    arguments = (x, packed, None, None, None, None, list(weight.shape), *place)
    op = torch.ops.lightning_prune.compact_conv2d.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
