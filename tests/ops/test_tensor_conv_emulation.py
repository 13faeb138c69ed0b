"""The tensor-core convolution's own source, run on the host with emulated warps and compared with float64: needs no GPU."""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.ops import reference, tensor_cores
from tests.ops.conv_cases import error
from tests.ops.test_cuda_index_emulation import ACTIVATION_NUMBER, compiled, pointer, strides

#: like TOLERANCE, and for float32 the rounding of both factors to 10 bits
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 3e-3}
NUMBER = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
DTYPES = sorted(BOUND, key=str)
#: the first 15 have a product per warp, the others one per four warps
TILES = 29


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    library = compiled("tensor_conv_emulation.cpp", "simt_emulation.h")
    library.choose.argtypes = [*[ctypes.c_int64] * 3, *[ctypes.c_int] * 2, ctypes.POINTER(ctypes.c_int)]
    library.carried_lanes.argtypes = [ctypes.c_int64] * 5
    library.weight_begin.argtypes = [ctypes.c_int64] * 4
    library.weight_begin.restype = ctypes.c_int64
    return library


@dataclass
class Case:
    """One convolution; ``out`` is the layout of residual and output."""

    dtype: torch.dtype
    batch: int = 2
    inputs: int = 37
    outputs: int = 41
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    bias: bool = True
    residual: bool = True
    activation: str = "relu"
    out: str = "padded"
    scatter: bool = False
    tile: int = -1
    splits: int = 0
    reverse: bool = False
    seed: int = 0
    depthwise: bool = False

    @property
    def groups(self) -> int:
        return self.inputs if self.depthwise else 1


def laid_out(x: torch.Tensor, layout: str, spare: float = float("nan")) -> torch.Tensor:
    """A copy of x: contiguous ("first"), channels_last ("last"), or with spare lanes that hold ``spare`` ("padded")."""
    if layout != "padded":
        # What follows the last element in its 16 bytes may be read and holds anything, as on the device.
        plain = x.contiguous(
            memory_format=torch.channels_last if layout == "last" else torch.contiguous_format
        )
        room = x.new_full((x.numel() + 8,), spare)
        copy = room.as_strided(plain.shape, plain.stride())
        return copy.copy_(x)
    n, c, h, w = x.shape
    room = x.new_full((n, -(-c // 8) * 8, h, w), spare).contiguous(memory_format=torch.channels_last)
    room[:, :c] = x
    return room[:, :c]


def emulate(emulator: ctypes.CDLL, case: Case) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Result, the float64 reference, and the counters."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    terms = case.inputs // case.groups * case.kernel[0] * case.kernel[1]
    weight = randn(case.outputs, case.inputs // case.groups, *case.kernel) / terms**0.5
    lanes = 4 if case.dtype == torch.float32 else 8
    direct = reference.pack_conv2d_weight(weight, case.groups).to(case.dtype)
    packed = torch.cat([direct, tensor_cores.tensor_weight(weight, case.groups, lanes)])
    taps = case.kernel[0] * case.kernel[1]
    begin = emulator.weight_begin(case.outputs, case.inputs // case.groups, taps, case.groups)
    packed = packed[begin:]
    assert packed.data_ptr() % 16 == 0
    # Spare lanes hold NaN: nothing of them may reach a result.
    x = laid_out(randn(case.batch, case.inputs, *case.size), "padded")
    bias = None
    if case.bias:  # at 16 bytes or not, and NaN behind it
        kind = torch.float32 if case.seed % 3 == 0 else case.dtype
        room = torch.full((case.outputs + 16,), float("nan"), dtype=kind)
        bias = room[case.seed % 2 :][: case.outputs].copy_(randn(case.outputs))
    place = [[case.stride] * 2, [case.padding] * 2, [case.dilation] * 2, case.groups]
    double = reference.pack_conv2d_weight(weight.double(), case.groups)
    width = case.outputs + 3 if case.scatter else case.outputs
    plain = reference.compact_conv2d(x.double(), double, None, None, None, None, list(weight.shape), *place)
    shape = (case.batch, width, *plain.shape[2:])
    index = torch.randperm(width, generator=generator)[: case.outputs] if case.scatter else None
    residual = laid_out(randn(*shape), case.out) if case.residual or case.scatter else None
    doubles = [None if t is None else t.double() for t in (bias, residual)]
    expected = reference.compact_conv2d(
        x.double(), double, *doubles, None, index, list(weight.shape), *place, case.activation
    )
    y = laid_out(torch.full(shape, float("nan"), dtype=case.dtype), case.out)
    if index is not None:  # what the residual kernel writes first
        y.copy_(reference.activation_function(case.activation)(residual.float()))
    numbers = (case.batch, case.inputs, *case.size, case.outputs, *case.kernel, *shape[2:])
    numbers += (
        case.stride,
        case.stride,
        case.padding,
        case.padding,
        case.dilation,
        case.dilation,
        case.groups,
    )
    counters = (ctypes.c_int64 * 5)()
    # The last pixel ends with its last channel: reading the spare lanes behind it would be outside.
    count = (case.batch * case.size[0] * case.size[1] - 1) * (-(-case.inputs // 8) * 8) + case.inputs
    code = emulator.emulate_tensor_conv(
        (ctypes.c_int64 * 17)(*numbers), NUMBER[case.dtype], pointer(x), strides(x),
        ctypes.c_int64(count * x.element_size()), pointer(packed), ctypes.c_int64(packed.nbytes), pointer(bias),
        int(bias is not None and bias.dtype == torch.float32),
        pointer(residual), None if residual is None else strides(residual), pointer(y), strides(y),
        int(case.out == "padded"), pointer(index), ctypes.c_int64(width), ACTIVATION_NUMBER[case.activation], case.tile,
        case.splits, int(case.reverse), counters,
    )  # fmt: skip
    assert code == 0
    return y, expected, list(counters)


def check(emulator: ctypes.CDLL, case: Case) -> None:
    y, expected, counters = emulate(emulator, case)
    assert error(y, expected) < BOUND[case.dtype]
    assert counters == [0] * 5  # bank conflicts reading, writing, misaligned, outside the tensors, races


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", range(TILES))
def test_every_tile(emulator: ctypes.CDLL, tile: int, dtype: torch.dtype) -> None:
    assert emulator.tile_count() == TILES
    if dtype == torch.float32 and emulator.tile_of_groups(tile):
        pytest.skip("warp groups multiply 16-bit types")
    # 150 pixels and 133 outputs: tails in every tile; depth 9 * 5 (9 * 10) chunks is no multiple of a step.
    check(emulator, Case(dtype, 3, 37, 133, (5, 10), tile=tile, reverse=tile % 2 == 1))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    groups = [] if dtype == torch.float32 else [17, 24, 26, 27, 28]
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 1)]))
    dilation = draw(st.integers(1, 2))
    padding = draw(st.integers(0, 2))
    least = [max(1, dilation * (k - 1) + 1 - 2 * padding) for k in kernel]
    return Case(
        dtype=dtype,
        batch=draw(st.integers(1, 3)),
        inputs=draw(st.sampled_from([1, 3, 8, 13, 37, 64, 101])),
        outputs=draw(st.sampled_from([1, 7, 8, 17, 37, 41, 64, 101])),
        size=(least[0] + draw(st.integers(0, 7)), least[1] + draw(st.integers(0, 7))),
        kernel=kernel,
        stride=draw(st.integers(1, 3)),
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ops.ACTIVATIONS))),
        out=draw(st.sampled_from(["padded", "last", "first"])),
        scatter=draw(st.booleans()),
        tile=draw(st.sampled_from([-1, 2, 8, 10, 11, 12, 13, 14, *groups])),
        splits=draw(st.sampled_from([0, 1, 2, 5])),
        reverse=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_any_convolution(emulator: ctypes.CDLL, case: Case) -> None:
    check(emulator, case)


def test_a_split_depth_gives_the_same_bits_every_time(emulator: ctypes.CDLL) -> None:
    first, second = (
        emulate(emulator, Case(torch.bfloat16, 1, 101, 40, splits=4, reverse=reverse))[0]
        for reverse in (False, True)
    )
    assert torch.equal(first, second)


def test_spare_lanes_of_the_output_are_zero(emulator: ctypes.CDLL) -> None:
    y, _, _ = emulate(emulator, Case(torch.bfloat16, outputs=37, activation="sigmoid"))
    room = y.as_strided((*y.shape[:1], 40, *y.shape[2:]), y.stride())
    assert torch.equal(room[:, 37:], torch.zeros_like(room[:, 37:]))


def test_choice_of_tiles(emulator: ctypes.CDLL) -> None:
    def choose(pixels: int, columns: int, depth: int, groups: bool = False) -> dict[str, int]:
        out = (ctypes.c_int * 6)()
        emulator.choose(pixels, columns, depth, 132, groups, out)
        return dict(zip(("tile", "splits", "x", "y", "bm", "bn"), out, strict=True))

    wide = choose(32 * 56 * 56, 40, 45)
    assert (wide["bn"], wide["splits"]) == (40, 1)  # no column is computed for nothing
    assert choose(32 * 28 * 28, 104, 9 * 13)["bn"] in (104, 56)
    small = choose(49, 512, 9 * 64)
    assert small["splits"] > 1
    assert small["x"] * small["y"] * small["splits"] > 66  # most of the chip has work
    for pixels in (1, 50, 3000, 10**6):
        for columns in (8, 104, 1000):
            got = choose(pixels, columns, 60)
            assert got["x"] * got["bm"] >= pixels
            assert got["y"] * got["bn"] >= columns
            assert not emulator.tile_of_groups(got["tile"])
    wide = choose(32 * 56 * 56, 40, 45, groups=True)
    assert emulator.tile_of_groups(wide["tile"])
    assert wide["bn"] == 40


def test_depth_is_walked_without_a_division(emulator: ctypes.CDLL) -> None:
    for tile in (0, 8):  # steps of 4 and 8 chunks
        for kernel in [(1, 1), (1, 16), (16, 1), (16, 16), (3, 3), (2, 5), (7, 7)]:
            for chunks in (1, 2, 3, 5, 8, 9, 16, 19):
                assert emulator.wrong_positions(tile, *kernel, chunks) == 0


def test_packed_sizes_are_told_apart(emulator: ctypes.CDLL) -> None:
    for o, c in [(1, 1), (16, 9), (37, 41), (64, 64), (8, 12)]:
        for kernel in (1, 3):
            shape, taps = (o, c, kernel, kernel), kernel * kernel
            direct = reference.packed_size(shape, 1)
            for lanes in (0, 4, 8):
                size = direct + tensor_cores.tensor_weight_size(shape, 1, lanes)
                assert emulator.carried_lanes(size, o, c, taps, 1) == lanes
                assert tensor_cores.carried_lanes(size, direct, shape, 1) == lanes
            for tile in (2, 4) if kernel == 3 else ():
                assert emulator.carried_lanes(reference.packed_size(shape, 1, tile), o, c, taps, 1) == 0

    for channels, lanes in [(2, 4), (37, 8), (64, 4)]:
        shape = (channels, 1, 3, 3)
        direct = reference.packed_size(shape, channels)
        size = direct + tensor_cores.tensor_weight_size(shape, channels, lanes)
        assert emulator.carried_lanes(size, channels, 1, 9, channels) == lanes
        assert emulator.carried_lanes(direct, channels, 1, 9, channels) == 0
        assert tensor_cores.carried_lanes(size, direct, shape, channels) == lanes


@given(case=cases(), channels=st.sampled_from([2, 8, 13, 37, 64]), width=st.integers(1, 11))
@settings(max_examples=60, deadline=None)
def test_any_depthwise_convolution(emulator: ctypes.CDLL, case: Case, channels: int, width: int) -> None:
    size = (case.size[0], max(case.size[1], width))
    case = dataclasses.replace(case, inputs=channels, outputs=channels, depthwise=True, size=size)
    y, expected, _ = emulate(emulator, case)
    # Nothing is rounded to 10 bits here.
    assert (
        error(y, expected)
        < {torch.float32: 1e-6, **{t: BOUND[t] for t in DTYPES if t != torch.float32}}[case.dtype]
    )


def test_conversions_round_as_torch_does(emulator: ctypes.CDLL) -> None:
    special = torch.tensor(
        [0.0, -0.0, 1e-8, 6e-8, 6.1e-5, 65503.0, 65520.0, 1e38, float("inf"), -float("inf"), float("nan")]
    )
    values = torch.cat([special, torch.randn(4000) * torch.logspace(-9, 5, 4000)])
    for dtype in (torch.bfloat16, torch.float16):
        bits, back = torch.empty(len(values), dtype=torch.uint16), torch.empty(len(values))
        emulator.convert(
            NUMBER[dtype], pointer(values), ctypes.c_int64(len(values)), pointer(bits), pointer(back)
        )
        torch.testing.assert_close(back, values.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
