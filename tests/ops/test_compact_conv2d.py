"""pack_conv2d_weight and compact_conv2d against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.ops import reference
from lightning_prune.ops.compact_conv2d import prepared_settings
from tests.ops.conv_cases import TOLERANCE, ConvCase, conv_cases, error

OP = torch.ops.lightning_prune
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@given(case=conv_cases(DTYPES), data=st.data())
@RELAXED
def test_matches_the_reference(target: torch.device, case: ConvCase, data: st.DataObject) -> None:
    x, weight, bias, _, _, _ = case.tensors(target)
    in_index = out_index = residual = None
    if data.draw(st.booleans(), label="gather"):
        # Any order, repeats allowed: the case's inputs are gathered from a map of another width.
        picks = data.draw(st.lists(st.integers(0, 24), min_size=case.inputs, max_size=case.inputs))
        in_index = torch.tensor(picks, dtype=torch.int64, device=target)
        wide = case.randn(x.shape[0], 25, *x.shape[2:]).to(target)
        x = wide.to(memory_format=torch.channels_last) if case.layout == "channels_last" else wide
    out_shape = OP.compact_conv2d(
        x,
        OP.pack_conv2d_weight(weight, case.groups),
        None,
        None,
        in_index,
        None,
        case.weight_shape,
        *case.settings,
    ).shape
    kind = data.draw(st.sampled_from(["none", "same", "scatter"]), label="residual")
    if kind != "none":
        extra = 11 if kind == "scatter" else 0
        residual = case.randn(out_shape[0], out_shape[1] + extra, *out_shape[2:]).to(target)
        if case.layout == "strided":
            residual = residual.to(memory_format=torch.channels_last)
        if kind == "scatter":
            order = data.draw(st.permutations(range(case.outputs + extra)))
            out_index = torch.tensor(order[: case.outputs], dtype=torch.int64, device=target)
    packed = OP.pack_conv2d_weight(weight, case.groups)
    y = OP.compact_conv2d(x, packed, bias, residual, in_index, out_index, case.weight_shape, *case.settings)
    numbers = prepared_settings(case.weight_shape, *case.settings)
    assert torch.equal(OP.compact_conv2d_prepared(x, packed, bias, residual, in_index, out_index, numbers), y)
    double = [None if t is None else t.double() for t in (x, packed, bias, residual)]
    expected = reference.compact_conv2d(*double, in_index, out_index, case.weight_shape, *case.settings)
    assert y.dtype == case.dtype
    assert y.shape == expected.shape
    assert error(y, expected) < TOLERANCE[case.dtype]
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()


@given(case=conv_cases(DTYPES))
@settings(RELAXED, max_examples=40)
def test_packing_is_the_reference_layout_and_reversible(target: torch.device, case: ConvCase) -> None:
    weight = case.randn(*case.weight_shape).to(target)
    if case.layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    packed = ops.pack_conv2d_weight(weight, case.groups)
    assert packed.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert torch.equal(packed, reference.pack_conv2d_weight(weight, case.groups))
    assert torch.equal(ops.unpack_conv2d_weight(packed, weight.shape, case.groups), weight.to(packed.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(target: torch.device, dtype: torch.dtype) -> None:
    # 0.1 is not representable: accumulating in the half type would be far off after 1024 terms.
    x = torch.full((1, 1024, 1, 1), 0.1, device=target, dtype=dtype)
    packed = ops.pack_conv2d_weight(torch.ones(3, 1024, 1, 1, device=target, dtype=dtype))
    y = ops.compact_conv2d(x, packed, None, None, None, None, [3, 1024, 1, 1])
    assert torch.equal(y, torch.full_like(y, x.double().sum().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_conversion_of_special_values(target: torch.device, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [
        0.0,
        -0.0,
        info.max,
        info.min,
        info.tiny,
        info.smallest_normal / 8,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    x = torch.tensor(values, device=target, dtype=dtype).view(-1, 1, 1, 1)
    packed = ops.pack_conv2d_weight(torch.ones(1, 1, 1, 1, device=target))
    y = ops.compact_conv2d(x, packed, None, None, None, None, [1, 1, 1, 1])
    assert torch.equal(y.nan_to_num(nan=12345.0), x.nan_to_num(nan=12345.0))


def test_residual_channels_without_output_get_the_activation(target: torch.device) -> None:
    residual = torch.full((1, 3, 2, 2), -1.0, device=target)
    packed = ops.pack_conv2d_weight(torch.ones(1, 1, 1, 1, device=target))
    x = torch.full((1, 1, 2, 2), 3.0, device=target)
    index = torch.tensor([1], device=target)
    y = ops.compact_conv2d(x, packed, None, residual, None, index, [1, 1, 1, 1], activation="relu")
    assert y[0, :, 0, 0].tolist() == [0.0, 2.0, 0.0]
    assert residual.eq(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scatter", [False, True])
def test_opcheck(target: torch.device, dtype: torch.dtype, scatter: bool) -> None:
    weight = torch.randn(5, 4, 3, 3, device=target).to(dtype)
    x = torch.randn(2, 6, 8, 8, device=target).to(dtype).to(memory_format=torch.channels_last)
    packed = OP.pack_conv2d_weight(weight, 1)
    gather = torch.tensor([5, 0, 0, 2], device=target)
    residual = torch.randn(2, 9 if scatter else 5, 8, 8, device=target).to(dtype)
    out_index = torch.tensor([8, 0, 3, 4, 1], device=target) if scatter else None
    torch.library.opcheck(OP.pack_conv2d_weight, (weight, 1))
    arguments = (
        x,
        packed,
        None,
        residual,
        gather,
        out_index,
        [5, 4, 3, 3],
        [1, 1],
        [1, 1],
        [1, 1],
        1,
        "silu",
    )
    torch.library.opcheck(OP.compact_conv2d, arguments)
    torch.library.opcheck(OP.compact_conv2d_prepared, (*arguments[:6], prepared_settings(*arguments[6:])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(5)}, r"packed must have shape \(216\).*\(4, 3, 3, 3\); got \(5\)"),
        (  # as many elements as would wrap around to none
            {
                "packed": torch.zeros(0),
                "x": torch.zeros(1, 4, 4, 4),
                "weight_shape": [8, 4, 2**30, 2**29],
                "padding": [2**29, 2**28],
            },
            "packed must have shape .*; got \\(0\\)",
        ),
        ({"packed": torch.zeros(216).double()}, "packed must be float32.*got float64"),
        ({"in_index": torch.tensor([0, 1])}, r"\(O, 2, kh, kw\) for 2 input channels"),
        ({"in_index": torch.tensor([0, 1, 3])}, r"in_index\[2\] = 3 is not a channel"),
        ({"out_index": torch.tensor([0, 1, 2, 3])}, "residual must not be None"),
        (
            {"out_index": torch.tensor([0, 1, 2, 2]), "residual": torch.zeros(1, 6, 2, 2)},
            "out_index must be unique; channel 2 appears twice",
        ),
        (
            {"out_index": torch.tensor([0]), "residual": torch.zeros(1, 6, 2, 2)},
            "one entry per conv output, 4; got 1",
        ),
        (
            {"residual": torch.zeros(1, 4, 3, 2)},
            r"residual must be float32 of shape \(1, 4, 2, 2\).*\(1, 4, 3, 2\)",
        ),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(4\)"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, "got int64"),
    ],
)
def test_bad_arguments_name_expected_and_actual(change: dict[str, object], message: str) -> None:
    if not ops.extension_available():
        pytest.skip("messages of the compiled operator")
    arguments: dict[str, object] = {
        "x": torch.zeros(1, 3, 4, 4),
        "packed": torch.zeros(216),
        "bias": None,
        "residual": None,
        "in_index": None,
        "out_index": None,
        "weight_shape": [4, 3, 3, 3],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "activation": "none",
    }
    with pytest.raises(RuntimeError, match=message):
        OP.compact_conv2d(*{**arguments, **change}.values())
    with pytest.raises(RuntimeError, match="groups must divide the 4 output channels; got groups=3"):
        OP.pack_conv2d_weight(torch.zeros(4, 3, 3, 3), 3)


@pytest.mark.parametrize(
    "numbers", [[4, 3, 3, 3], [4, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1, 7], [4, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1, -1]]
)
def test_bad_settings_are_refused(numbers: list[int]) -> None:
    if not ops.extension_available():
        pytest.skip("messages of the compiled operator")
    with pytest.raises(
        RuntimeError, match="settings must be weight_shape, .* 12 integers; got \\(4, 3, 3, 3"
    ):
        OP.compact_conv2d_prepared(torch.zeros(1, 3, 4, 4), torch.zeros(216), None, None, None, None, numbers)


def test_every_activation_has_its_place() -> None:
    if not ops.extension_available():
        pytest.skip("no compiled extension")
    x, packed = torch.linspace(-4, 7, 24).view(1, 1, 4, 6), OP.pack_conv2d_weight(torch.ones(1, 1, 1, 1), 1)
    for name, function in ops.ACTIVATIONS.items():
        numbers = prepared_settings([1, 1, 1, 1], activation=name)
        y = OP.compact_conv2d_prepared(x, packed, None, None, None, None, numbers)
        torch.testing.assert_close(y, function(x), msg=name)
