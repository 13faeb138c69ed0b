"""Strassen's algorithm for 1x1 convolutions: against float64 over ragged widths, its accuracy, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import ops
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops import reference
from lightning_prune.ops.strassen import strassen_gains, strassen_pays, strassen_units, strassen_weight
from lightning_prune.ops.winograd import algorithm_for
from tests.ops.accuracy_cases import KINDS, WEIGHTS, AccuracyCase, check_accuracy, exact
from tests.ops.accuracy_cases import convolve as convolve_case
from tests.ops.conv_cases import check_drawn, error

OP = torch.ops.lightning_prune
# Around halves of inputs and around panels, halves and units of outputs.
INPUTS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 37, 64, 101])
OUTPUTS = st.sampled_from([1, 48, 56, 57, 60, 63, 64, 65, 67, 80, 101, 112, 120, 121, 127, 128, 131, 192])


@pytest.fixture(autouse=True)
def on_the_cpu(target: torch.device) -> None:
    if target.type == "cuda":
        pytest.skip("these weights are packed on the CPU")


def convolve(x: Tensor, weight: Tensor, algorithm: str) -> Tensor:
    packed = ops.pack_conv2d_weight(weight, 1, algorithm)
    return ops.compact_conv2d(
        x.to(memory_format=torch.channels_last), packed, None, None, None, None, list(weight.shape)
    )


@given(
    data=st.data(),
    batch=st.sampled_from([0, 1, 2, 5]),
    inputs=INPUTS,
    outputs=OUTPUTS,
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_the_reference(
    data: st.DataObject, batch: int, inputs: int, outputs: int, size: tuple[int, int]
) -> None:
    check_drawn(data, ("strassen", 1), batch, inputs, outputs, size, 1, (0, 0), (1, 1))


@given(
    batch=st.integers(1, 3),
    inputs=INPUTS,
    outputs=OUTPUTS,
    height=st.integers(7, 13),
    width=st.integers(7, 13),
    activation=st.sampled_from(sorted(ops.ACTIVATIONS)),
    bias=st.booleans(),
    residual=st.sampled_from(["none", "same", "runs"]),
    stream=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_of_sums(
    batch: int,
    inputs: int,
    outputs: int,
    height: int,
    width: int,
    activation: str,
    bias: bool,
    residual: str,
    stream: bool,
    seed: int,
) -> None:
    """Dense maps and runs of channels of wider ones: what the kernel itself computes."""
    generator = torch.Generator().manual_seed(seed)

    def maps(channels: int) -> Tensor:
        return torch.randn(batch, channels, height, width, generator=generator).to(
            memory_format=torch.channels_last
        )

    weight = torch.randn(outputs, inputs, 1, 1, generator=generator) / inputs**0.5
    x = maps(inputs + 5 * stream)
    in_index = torch.arange(3, 3 + inputs) if stream else None
    out_index = torch.arange(2, 2 + outputs) if residual == "runs" else None
    added = None if residual == "none" else maps(outputs + 7 * (residual == "runs"))
    shift = torch.randn(outputs, generator=generator) if bias else None
    arguments = (in_index, out_index, list(weight.shape), [1, 1], [0, 0], [1, 1], 1, activation)
    before = None if added is None else added.clone()
    y = ops.compact_conv2d(x, ops.pack_conv2d_weight(weight, 1, "strassen"), shift, added, *arguments)
    double = [None if t is None else t.double() for t in (x, ops.pack_conv2d_weight(weight), shift, added)]
    assert error(y, reference.compact_conv2d(*double, *arguments)) < 1e-5
    if added is not None:
        assert torch.equal(added, before)


def test_it_is_taken() -> None:
    """It rounds otherwise than the direct sum, from 48 pixels and 57 outputs up, and nowhere else."""
    x = torch.randn(1, 64, 8, 8)
    for outputs, height, taken in ((64, 8, True), (57, 8, True), (56, 8, False), (64, 5, False)):
        weight = torch.randn(outputs, 64, 1, 1)
        maps = x[:, :, :height]
        assert torch.equal(convolve(maps, weight, "strassen"), convolve(maps, weight, "direct")) is not taken
    weight = torch.randn(64, 64, 1, 1)
    packed = [ops.pack_conv2d_weight(weight, 1, a) for a in ("strassen", "direct")]
    double = [ops.compact_conv2d(x.double(), p.double(), *[None] * 4, list(weight.shape)) for p in packed]
    assert torch.equal(*double)
    # sums of rounded weights would be worse than the weights
    halves = [ops.compact_conv2d(x.bfloat16(), p.bfloat16(), *[None] * 4, list(weight.shape)) for p in packed]
    assert torch.equal(*halves)


@pytest.mark.parametrize("shape", [(64, 64), (131, 37), (121, 2), (57, 1), (56, 8), (256, 101)])
def test_packed_is_the_direct_layout_and_the_sums(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, 1, 1)
    packed = ops.pack_conv2d_weight(weight, 1, "strassen")
    torch.testing.assert_close(
        packed, reference.pack_conv2d_weight(weight, 1, "strassen"), rtol=1e-6, atol=1e-7
    )
    assert torch.equal(ops.unpack_conv2d_weight(packed, weight.shape), weight)
    transformed = strassen_weight(weight)
    assert transformed.shape == (32 * strassen_units(shape[0]), (shape[1] + 1) // 2, 1, 7)


@given(inputs=INPUTS, outputs=OUTPUTS, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_seven_products_are_the_product(inputs: int, outputs: int, seed: int) -> None:
    """The definition, in float64: the combinations of the seven products are the four quarters."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, 1, 1, generator=generator, dtype=torch.float64)
    upper, lower = torch.randn(2, 3, inputs, generator=generator, dtype=torch.float64)
    transformed = strassen_weight(weight)[:, :, 0]
    depth = transformed.shape[1]
    (a11, a12), (a21, a22) = ((half[:, :depth], half[:, inputs - depth :]) for half in (upper, lower))
    s1, s2 = a21 + a22, a21 + a22 - a11
    p = [
        a @ transformed[:, :, i].T for i, a in enumerate((a11, a12, s2, a11 - a21, a22, s1, a12 - s2))
    ]  # (3, 32 per unit)
    u2, u3 = p[0] + p[2], p[0] + p[2] + p[3]
    units = strassen_units(outputs)
    for given_rows, left, right in (
        (upper, p[0] + p[1], u2 + p[5] + p[6]),
        (lower, u3 + p[4], u3 + p[5]),
    ):
        quarters = [part.unflatten(1, (units, 32)) for part in (left, right)]
        found = torch.stack(quarters, 2).flatten(1)[:, : min(outputs, 64 * units)]
        torch.testing.assert_close(found, given_rows @ weight[: found.shape[1], :, 0, 0].T)


@pytest.mark.parametrize("kind", [*KINDS, "pixels", "channels"])
@pytest.mark.parametrize("channels", [3, 64, 700])
def test_accuracy(kind: str, channels: int) -> None:
    for weights in WEIGHTS.get(kind, ("normal", "range", "half zero", "opposite", "positive")):
        case = AccuracyCase(kind, weights, channels, 128, 1)
        check_accuracy(case, "strassen")
        if kind in ("normal", "relu") and weights == "normal":
            worst, direct = (
                float((convolve_case(case, name).double() - exact(case)[0]).abs().max())
                for name in ("strassen", "direct")
            )
            assert worst < 6 * direct


def test_special_values_stay_in_reach() -> None:
    # A pair shares its inputs; pairs are at most 27 pixels apart.
    x = torch.zeros(1, 64, 14, 14)
    x[0, 3, 7, 0] = float("nan")
    y = convolve(x, torch.ones(128, 64, 1, 1), "strassen").flatten(2)
    assert y[0, :, 98].isnan().all()
    assert not y[0, :, : 98 - 27].isnan().any()
    assert not y[0, :, 98 + 28 :].isnan().any()


@pytest.mark.parametrize("shape", [(1, 70, 150, 7, 7), (1, 33, 333, 14, 11), (5, 20, 131, 14, 12)])
def test_threads_do_not_change_the_numbers(shape: tuple[int, ...]) -> None:
    batch, inputs, outputs, height, width = shape
    x = torch.randn(batch, inputs, height, width).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 1, 1) / inputs**0.5, torch.randn(outputs)
    packed = ops.pack_conv2d_weight(weight, 1, "strassen")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ops.compact_conv2d(x, packed, bias, None, None, None, list(weight.shape), activation="silu")
            results.append(y)
    finally:
        torch.set_num_threads(before)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double())
    assert all(error(y, exact * exact.sigmoid()) < 1e-5 for y in results)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_when_it_pays() -> None:
    assert strassen_pays((128, 64, 1, 1))
    assert not strassen_pays((56, 512, 1, 1))
    assert not strassen_pays((512, 32, 1, 1))
    assert strassen_gains((128, 64, 1, 1), 49)
    assert not strassen_gains((128, 64, 1, 1), 36)
    assert not strassen_gains((2048, 512, 1, 1), 49)
    assert not strassen_gains((256, 64, 1, 1), 8 * 56**2)
    assert strassen_gains((256, 64, 1, 1), 56**2)
    assert strassen_gains((256, 96, 1, 1), 8 * 56**2)
    assert algorithm_for((256, 128, 1, 1), 1, 14, 14) == "auto"
    assert algorithm_for((256, 128, 1, 1), 1, 4, 4) == "direct"
    assert algorithm_for((256, 128, 1, 1), 8, 14, 14, 2) == "direct"
    for shape in ((128, 64, 1, 1), (57, 48, 1, 1), (56, 64, 1, 1), (113, 47, 1, 1)):
        weight = torch.randn(shape)
        chosen = "strassen" if strassen_pays(shape) else "direct"
        assert torch.equal(
            ops.pack_conv2d_weight(weight, 1, "auto"), ops.pack_conv2d_weight(weight, 1, chosen)
        )
        assert torch.equal(
            ops.pack_conv2d_weight(weight.half(), 1, "auto"), ops.pack_conv2d_weight(weight.half())
        )


def test_module() -> None:
    conv = nn.Conv2d(70, 131, 1)
    plain = reference.packed_size(conv.weight.shape, 1)
    fast, exact = (CompactConv2d.from_conv(conv, exact=exact, backend="own") for exact in (False, True))
    assert exact.packed.numel() == plain
    assert fast.packed.numel() == plain + 7 * 35 * 64
    assert fast.state_dict()["packed"].numel() == plain
    assert torch.equal(fast.weight, exact.weight)
    x = torch.randn(2, 70, 9, 9).to(memory_format=torch.channels_last)
    expected = conv.double()(x.double())
    for module, bound in ((fast, 1e-5), (exact, 2e-6)):
        assert error(module(x), expected) < bound
    # other strides never use it, nor do other types
    for module in (
        CompactConv2d.from_conv(nn.Conv2d(70, 131, 1, stride=2)),
        CompactConv2d.from_conv(nn.Conv2d(70, 131, 1), algorithm="strassen").bfloat16(),
        CompactConv2d.from_conv(nn.Conv2d(70, 131, 1), algorithm="strassen").double(),
    ):
        assert module.packed.numel() == plain
    assert torch.equal(fast.bfloat16().float().weight, exact.bfloat16().float().weight)
    assert fast.packed.numel() == plain + 7 * 35 * 64


def test_algorithm_is_checked() -> None:
    for weight, groups in (
        (torch.zeros(64, 64, 3, 3), 1),
        (torch.zeros(64, 64, 1, 1).half(), 1),
        (torch.zeros(64, 64, 1, 1).double(), 1),
        (torch.zeros(64, 32, 1, 1), 2),
    ):
        with pytest.raises((ValueError, RuntimeError), match="'strassen' takes float32 weights on the CPU"):
            ops.pack_conv2d_weight(weight, groups, "strassen")


def test_opcheck() -> None:
    weight = torch.randn(67, 12, 1, 1)
    torch.library.opcheck(OP.pack_conv2d_weight, (weight, 1, "strassen"))
    packed = OP.pack_conv2d_weight(weight, 1, "strassen")
    x = torch.randn(2, 12, 8, 8)
    arguments = (x, packed, None, None, None, None, [67, 12, 1, 1], [1, 1], [0, 0], [1, 1], 1, "relu")
    torch.library.opcheck(OP.compact_conv2d, arguments)
