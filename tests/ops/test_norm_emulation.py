"""The CUDA batch normalisation's own source, run on the host with emulated threads and compared with float64: needs no GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import ops
from lightning_prune.ops import reference_norm
from tests.ops.conv_cases import error
from tests.ops.test_cuda_index_emulation import ACTIVATION_NUMBER, compiled

NUMBER = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: of maps: one rounding of the result; vectors are summed from inputs that are exact
MAPS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
VECTORS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
DTYPES = sorted(NUMBER, key=str)
#: elements around every map that must neither reach a result nor be written
GUARD = 64
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    library = compiled("norm_emulation.cpp", "simt_emulation.h")
    library.emulate_norm.argtypes = [
        *[ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int],
        *[ctypes.c_double, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p],
    ]
    library.emulate_norm.restype = None
    return library


@dataclass
class Case:
    """One call; ``live`` lists channels, ``compact``: the maps hold these alone."""

    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    channels: int = 8
    pixels: int = 9
    last: bool = True
    activation: str = "relu"
    training: bool = True
    residual: bool = True
    vectors: tuple[bool, bool, bool] = (True, True, True)
    live: list[int] | None = None
    compact: bool = False
    offset: float = 0.0
    shift: int = 0
    processors: int = 3
    reverse: bool = False
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def wide(self) -> torch.dtype:
        """Of the vectors."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def map_channels(self) -> int:
        return len(self.live) if self.compact and self.live is not None else self.channels

    def guarded(self, values: Tensor | None) -> tuple[Tensor, Tensor]:
        """A buffer of NaN and a map in its middle, ``shift`` elements from a 16-byte boundary, laid out as the case says."""
        n, c, p = self.batch, self.map_channels, self.pixels
        buffer = torch.full((n * c * p + 2 * GUARD + 8,), float("nan"), dtype=self.dtype)
        lanes = 16 // buffer.element_size()
        start = GUARD + self.shift + (-buffer.data_ptr() // buffer.element_size()) % lanes
        strides = (c * p, 1, c) if self.last else (c * p, p, 1)
        view = buffer.as_strided((n, c, p), strides, start)
        if values is not None:
            view.copy_(values)
        return buffer, view

    def randn(self, *shape: int, offset: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) + offset).to(self.dtype)


def untouched(buffer: Tensor, view: Tensor) -> bool:
    outside = torch.ones(len(buffer), dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return bool(buffer[outside].isnan().all())


def emulate(
    emulator: ctypes.CDLL, case: Case
) -> tuple[dict[str, Tensor], dict[str, Tensor | None], list[int]]:
    """Results, those of the float64 reference, and parts, slabs, width, repeat and lanes of the plan."""
    shape = (case.batch, case.map_channels, case.pixels)
    x, grad = case.randn(*shape, offset=case.offset), case.randn(*shape)
    residual = case.randn(*shape) if case.residual else None
    given = [
        torch.randn(case.channels, generator=case.generator).to(case.wide) if v else None
        for v in case.vectors
    ]
    live = None if case.live is None else torch.tensor(case.live, dtype=torch.int64)
    dead = torch.ones(case.map_channels, dtype=torch.bool)
    dead[slice(None) if live is None or case.compact else live] = False
    x[:, dead] = float("nan")  # nobody may read it
    mean, var = torch.zeros(case.channels, dtype=case.wide), torch.zeros(case.channels, dtype=case.wide)
    if not case.training:
        mean, var = mean + torch.randn(case.channels, generator=case.generator), var + 0.75
    compact_of = case.channels if case.compact else 0

    leaves = [
        None if t is None else t.double().requires_grad_()
        for t in (x[..., None], None if residual is None else residual[..., None], *given)
    ]
    statistics = (None, None) if case.training else (mean.double(), var.double())
    exact, exact_mean, exact_var = reference_norm.masked_batch_norm_act(
        *leaves, *statistics, live, 0.1, case.activation, compact_of
    )
    expected: dict[str, Tensor | None] = {"y": exact[..., 0], "mean": exact_mean, "var": exact_var}
    z = reference_norm.masked_batch_norm_act(*leaves, *statistics, live, 0.1, "none", compact_of)[0][..., 0]
    for kink in KINKS.get(case.activation, ()):  # a value rounded to its other side has another gradient
        grad[(z - kink).abs() < 1e-4] = 0
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(exact, wanted, grad[..., None].double(), allow_unused=True))
    names = ("grad_x", "grad_residual", "grad_weight", "grad_bias", "grad_gate")
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None:
            found = next(grads)
            found = torch.zeros_like(leaf) if found is None else found
            expected[name] = found[..., 0] if found.dim() == 4 else found

    maps = {
        "x": case.guarded(x),
        "residual": None if residual is None else case.guarded(residual),
        "y": case.guarded(None),
        "grad_y": case.guarded(grad),
        "grad_x": case.guarded(None),
        "grad_residual": None if residual is None else case.guarded(None),
    }
    vector_grads = [None if v is None else torch.zeros_like(v) for v in given]
    vectors = [*given, mean, var, *vector_grads]
    sizes = (
        case.batch, case.map_channels, case.pixels, case.last, case.channels,
        -1 if live is None or case.compact else len(live), int(case.compact),
    )  # fmt: skip
    used = (ctypes.c_int64 * 5)()
    for forward in (1, 0):
        emulator.emulate_norm(
            (ctypes.c_int64 * 7)(*sizes),
            NUMBER[case.dtype],
            (ctypes.c_void_p * 6)(*(None if m is None else m[1].data_ptr() for m in maps.values())),
            (ctypes.c_void_p * 8)(*(None if v is None else v.data_ptr() for v in vectors)),
            None if live is None else live.data_ptr(),
            int(case.training),
            0.1,
            ACTIVATION_NUMBER[case.activation],
            forward,
            (ctypes.c_int * 3)(case.processors, int(case.reverse), 0),
            used,
        )
    for pair in maps.values():
        assert pair is None or untouched(*pair)
    found_all = {n: m[1] for n, m in maps.items() if m is not None and n not in ("x", "residual", "grad_y")}
    found_all |= {"mean": mean, "var": var} if case.training else {}  # else they are given
    found_all |= {n: g for n, g in zip(names[2:], vector_grads, strict=True) if g is not None}
    return found_all, expected, list(used)


def check(emulator: ctypes.CDLL, case: Case) -> list[int]:
    found, expected, used = emulate(emulator, case)
    for name, value in found.items():
        exact = expected[name]
        assert exact is not None
        bound = MAPS[case.dtype] if value.dim() == 3 else VECTORS[case.dtype]
        if value.dim() == 1:  # of a sum, against the sum of what is added
            exact, value = exact / (case.batch * case.pixels), value / (case.batch * case.pixels)
        assert error(value, exact) < bound, name
    if case.live is not None and not case.compact:
        dead = torch.ones(case.channels, dtype=torch.bool)
        dead[case.live] = False
        assert not found["grad_x"][:, dead].any()
    return used


@st.composite
def cases(draw: st.DrawFn) -> Case:
    channels = draw(st.sampled_from([1, 3, 7, 8, 12, 16, 24, 37, 64, 101]))
    dtype = draw(st.sampled_from(DTYPES))
    live, compact = None, False
    if draw(st.booleans()):
        live = sorted(draw(st.sets(st.integers(0, channels - 1))))
        compact = bool(live) and draw(st.booleans())
    return Case(
        dtype=dtype,
        batch=draw(st.sampled_from([1, 2, 5])),
        channels=channels,
        pixels=draw(st.sampled_from([1, 2, 8, 9, 25, 48])),
        last=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ops.ACTIVATIONS))),
        training=draw(st.booleans()),
        residual=draw(st.booleans()),
        vectors=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        live=live,
        compact=compact,
        offset=draw(st.sampled_from([0.0, 2.0])),
        shift=draw(st.sampled_from([0, 0, 1, 3])),
        processors=draw(st.sampled_from([1, 2, 132])),
        reverse=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_any_map(emulator: ctypes.CDLL, case: Case) -> None:
    check(emulator, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_parts_and_slabs(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    # The last line (half types: 8 pixels of the 1100) and the last block of columns are cut off.
    live = [*range(3, 640, 2)]
    parts, slabs, width, repeat, lanes = check(
        emulator, Case(dtype, 11, 643, 100, activation="silu", processors=132, live=live)
    )
    assert parts > 1
    assert slabs * width > 643 * repeat // lanes
    assert repeat == lanes == 16 // torch.empty((), dtype=dtype).element_size()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_parts_of_planes(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    parts, slabs, *_ = check(
        emulator, Case(dtype, 20, 3, 1000, last=False, activation="silu", processors=132)
    )
    assert parts > 1
    assert slabs == 3


@pytest.mark.parametrize("last", [True, False])
def test_one_block_when_there_is_little(emulator: ctypes.CDLL, last: bool) -> None:
    used = check(emulator, Case(torch.float16, 1, 8, 8, last))
    assert used[:2] == ([1, 1] if last else [1, 8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [True, False])
def test_a_large_mean_does_not_cancel_the_variance(
    emulator: ctypes.CDLL, dtype: torch.dtype, last: bool
) -> None:
    case = Case(dtype, 3, 19, 400, last, "none", offset=1000.0, processors=20)
    found, expected, _ = emulate(emulator, case)
    for name, bound in (("mean", 1e-7), ("var", 3e-6)):
        exact = expected[name].detach()  # type: ignore[union-attr]
        assert float(((found[name].double() - exact) / exact).abs().max()) < bound


def test_the_order_of_blocks_does_not_change_a_bit(emulator: ctypes.CDLL) -> None:
    cases_ = [
        Case(torch.bfloat16, 7, 37, 99, processors=40, reverse=r, activation="silu") for r in (False, True)
    ]
    first, second = (emulate(emulator, case)[0] for case in cases_)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@given(
    pixels=st.integers(1, 2**22),
    channels=st.integers(1, 5000),
    last=st.booleans(),
    lanes=st.sampled_from([1, 2, 4, 8]),
    processors=st.sampled_from([1, 20, 132]),
)
@settings(max_examples=200, deadline=None)
def test_plans_cover_the_map(
    emulator: ctypes.CDLL, pixels: int, channels: int, last: bool, lanes: int, processors: int
) -> None:
    pixels = pixels if last else -(-pixels // lanes) * lanes
    sum_bytes, out = 8 if lanes == 2 else 4, (ctypes.c_int64 * 9)()
    emulator.norm_plan_of(
        ctypes.c_int64(pixels), ctypes.c_int64(channels), int(last), lanes, sum_bytes, processors, out
    )
    lines, columns, width, rows, slabs, parts, per_part, sums, tables = out
    assert width * rows <= 256 < width * (rows + 1)
    assert (slabs - 1) * width < columns <= slabs * width
    assert (parts - 1) * per_part < lines <= parts * per_part
    assert parts * slabs <= max(slabs, 4 * processors + slabs)
    assert max(sums, tables) <= 48 << 10
    if last:
        assert lines * columns * lanes >= pixels * channels > (lines - 1) * columns * lanes
    else:
        assert lines * lanes * channels == pixels * channels
