"""masked_conv2d and its backward against the float64 reference."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lightning_prune import ops
from lightning_prune.ops import reference
from tests.ops.conv_cases import TOLERANCE, ConvCase, conv_cases, error, off_kinks

OP = torch.ops.lightning_prune
# The fixture only sets an environment variable, so sharing it between examples is right.
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def dead(index: torch.Tensor | None, count: int) -> torch.Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    if index is not None:
        mask[:] = True
        mask[index.cpu()] = False
    return mask


@given(case=conv_cases())
@RELAXED
def test_forward_and_backward_match_the_reference(target: torch.device, case: ConvCase) -> None:
    x, weight, bias, gate, live_in, live_out = case.tensors(target)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, gate) if t is not None]
    rest = iter(leaves[2:])
    own = [leaves[0], leaves[1], next(rest) if case.bias else None, next(rest) if case.gate else None]
    y = OP.masked_conv2d(*own, live_in, live_out, *case.settings)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in own]
    expected = reference.masked_conv2d(*wide, live_in, live_out, *case.settings)
    assert y.shape == expected.shape
    assert y.dtype == case.dtype
    tolerance = TOLERANCE[case.dtype]
    assert error(y, expected) < tolerance
    assert not y[:, dead(live_out, case.outputs)].any()

    before = reference.masked_conv2d(*wide, live_in, live_out, *case.settings[:-1], "none")
    grad_y = off_kinks(case.randn(*y.shape).to(target), before, case.activation, tolerance)
    grads = torch.autograd.grad(y, leaves, grad_y)
    expected_grads = torch.autograd.grad(
        expected, [t for t in wide if t is not None], grad_y.double(), allow_unused=True
    )
    for grad, wanted, leaf in zip(grads, expected_grads, leaves, strict=True):
        wanted = torch.zeros_like(leaf, dtype=torch.float64) if wanted is None else wanted
        assert grad.shape == leaf.shape
        assert error(grad, wanted) < tolerance
    dead_in, dead_out = dead(live_in, case.inputs), dead(live_out, case.outputs)
    assert not grads[0][:, dead_in].any()
    for grad in grads[1:]:
        assert not grad[dead_out].any()


@given(case=conv_cases())
@settings(RELAXED, max_examples=20)
def test_memory_format_follows_the_input(target: torch.device, case: ConvCase) -> None:
    x, *rest = case.tensors(target)
    y = OP.masked_conv2d(x, *rest, *case.settings)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()


@pytest.mark.parametrize("activation", sorted(ops.ACTIVATIONS))
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradcheck(target: torch.device, activation: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(target).requires_grad_()

    inputs = (leaf(2, 6, 5, 4), leaf(6, 6 // groups, 3, 2), leaf(6), leaf(6))
    live_in = torch.tensor([0, 2, 3, 5], device=target)
    live_out = torch.tensor([1, 2, 4, 5], device=target)
    assert torch.autograd.gradcheck(
        lambda *t: ops.masked_conv2d(
            *t, live_in, live_out, stride=(1, 2), padding=1, groups=groups, activation=activation
        ),
        inputs,
    )


def test_gate_gradient_is_exact_where_the_gate_is_zero(target: torch.device) -> None:
    x, weight = torch.randn(2, 3, 6, 6, device=target), torch.randn(4, 3, 3, 3, device=target)
    gate = torch.tensor([0.0, 1.0, 0.0, -2.0], device=target, requires_grad=True)
    bias = torch.randn(4, device=target)
    ops.masked_conv2d(x, weight, bias, gate).square().sum().backward()
    own, gate.grad = gate.grad, None
    ops.masked_conv2d(x, weight, bias, gate).sum().backward()
    expected = torch.nn.functional.conv2d(x, weight, bias).sum((0, 2, 3))
    assert own is not None
    assert own[0] == 0  # d(y^2) vanishes with y
    assert own[1] != 0
    torch.testing.assert_close(gate.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dead_channels_are_not_read(target: torch.device, groups: int) -> None:
    x = torch.randn(2, 4, 5, 5, device=target)
    weight = torch.randn(4, 4 // groups, 3, 3, device=target)
    live = torch.tensor([0, 3], device=target)
    expected = reference.masked_conv2d(x, weight, live_in=live, live_out=live, groups=groups)
    x[:, 1:3] = float("nan")
    weight[1:3] = float("nan")
    x.requires_grad_()
    y = ops.masked_conv2d(x, weight, None, None, live, live, groups=groups)
    assert torch.allclose(y, expected, atol=1e-5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", ["plain", "channels_last", "depthwise", "empty"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_opcheck(target: torch.device, shape: str, activation: str) -> None:
    groups = 6 if shape == "depthwise" else 1
    x = torch.randn(0 if shape == "empty" else 2, 6, 7, 7, device=target)
    if shape == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(6, 6 // groups, 3, 3, device=target, requires_grad=True)
    bias, gate = (torch.randn(6, device=target, requires_grad=True) for _ in range(2))
    live = torch.tensor([0, 2, 5], device=target)
    shared = (live, live, [2, 2], [1, 1], [1, 1], groups, activation)
    torch.library.opcheck(OP.masked_conv2d, (x.requires_grad_(), weight, bias, gate, *shared))
    plain = [t.detach() for t in (x, weight, bias, gate)]
    y = OP.masked_conv2d(*plain, *shared)
    needs = (True, True, False, True)
    torch.library.opcheck(OP.masked_conv2d_backward, (torch.ones_like(y), y, *plain, *shared, *needs))


def test_second_derivative_is_refused(target: torch.device) -> None:
    x = torch.randn(1, 2, 4, 4, device=target, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, device=target, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.masked_conv2d(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_autocast_runs_in_float32(target: torch.device) -> None:
    x, weight = torch.randn(1, 2, 4, 4, device=target), torch.randn(2, 2, 3, 3, device=target)
    with torch.autocast(target.type, dtype=torch.bfloat16):
        y = ops.masked_conv2d(x.bfloat16(), weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(
        y, torch.nn.functional.conv2d(x.bfloat16().float(), weight), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be 4-D.*\(3, 4, 4\)"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, "float32 or float64; got int32"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, r"\(O, 3, kh, kw\) for 3 input channels.*\(4, 2, 3, 3\)"),
        ({"weight": torch.zeros(4, 3, 3, 3).double()}, "weight must be float32 like x; got float64"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(4\).*got \(3\)"),
        ({"gate": torch.zeros(4).double()}, "gate must be float32; got float64"),
        ({"live_in": torch.tensor([1, 0])}, "live_in must be sorted and unique; got 1 before 0"),
        ({"live_in": torch.tensor([0, 0])}, "live_in must be sorted and unique"),
        ({"live_out": torch.tensor([0, 4])}, r"live_out\[1\] = 4 is not a channel; expected 0 <= index < 4"),
        ({"live_out": torch.tensor([-1])}, r"live_out\[0\] = -1"),
        ({"live_out": torch.tensor([0], dtype=torch.int32)}, "1-D int64.*int32"),
        ({"stride": [0, 1]}, r"stride must be two integers >= 1; got \(0, 1\)"),
        (
            {"padding": [2**60 + 100, 0]},
            r"padding must be less than 2147483648; got \(1152921504606847076, 0\)",
        ),
        ({"padding": [-1, 0]}, r"padding must be two integers >= 0; got \(-1, 0\)"),
        ({"groups": 2}, "groups must divide both channel counts; got groups=2 for 3 inputs"),
        ({"dilation": [3, 3]}, "dilated kernel is larger than the padded input"),
        ({"activation": "tanh"}, "activation must be one of none, relu.*got 'tanh'"),
    ],
)
def test_bad_arguments_name_expected_and_actual(change: dict[str, object], message: str) -> None:
    if not ops.extension_available():
        pytest.skip("messages of the compiled operator")
    arguments: dict[str, object] = {
        "x": torch.zeros(1, 3, 4, 4),
        "weight": torch.zeros(4, 3, 3, 3),
        "bias": None,
        "gate": None,
        "live_in": None,
        "live_out": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "activation": "none",
    }
    with pytest.raises(RuntimeError, match=message):
        OP.masked_conv2d(*{**arguments, **change}.values())


def test_concurrent_calls_agree(target: torch.device) -> None:
    x, weight = torch.randn(2, 19, 14, 14, device=target), torch.randn(21, 19, 3, 3, device=target)
    expected = ops.masked_conv2d(x, weight, padding=1)
    results: list[bool] = []

    def work() -> None:
        results.extend(torch.equal(ops.masked_conv2d(x, weight, padding=1), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 120
    assert all(results)


def test_gradients_are_deterministic_with_many_threads(target: torch.device) -> None:
    x, weight = torch.randn(7, 19, 14, 14, device=target), torch.randn(21, 19, 3, 3, device=target)
    grad_y = torch.randn(7, 21, 14, 14, device=target)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [ops.masked_conv2d_backward(grad_y, None, x, weight, padding=1) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    for grad_x, grad_weight, _, _ in runs[1:]:
        assert torch.equal(grad_x, runs[0][0])
        assert torch.equal(grad_weight, runs[0][1])
    expected = torch.autograd.grad(
        torch.nn.functional.conv2d(x.double(), w := weight.double().requires_grad_(), padding=1),
        w,
        grad_y.double(),
    )
    assert error(runs[0][1], expected[0]) < TOLERANCE[torch.float32]


def test_compiles_without_graph_breaks(target: torch.device) -> None:
    weight = torch.randn(4, 3, 3, 3, device=target, requires_grad=True)
    live = torch.tensor([0, 2], device=target)

    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.masked_conv2d(x, weight, None, None, None, live, padding=1, activation="relu").sum()

    x = torch.randn(2, 3, 5, 5, device=target)
    (expected,) = torch.autograd.grad(step(x), weight)
    (actual,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), weight)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "batch", "kernel", "stride", "groups"),
    [
        (37, 41, 60, 3, 3, 1, 1),  # several bands per image
        (3, 19, 130, 1, 7, 2, 1),  # wide rows
        (260, 50, 7, 9, 3, 1, 1),  # several images per task
        (70, 70, 61, 2, 3, 2, 70),  # depthwise over chunks and bands
        (48, 33, 40, 2, 1, 2, 1),  # strided 1x1
    ],
)
def test_maps_larger_than_one_task(
    target: torch.device,
    channels: int,
    outputs: int,
    size: int,
    batch: int,
    kernel: int,
    stride: int,
    groups: int,
) -> None:
    x = torch.randn(batch, channels, size, size - 3, device=target, requires_grad=True)
    weight = torch.randn(outputs, channels // groups, kernel, kernel, device=target, requires_grad=True)
    live_out = torch.arange(0, outputs, 2, device=target)
    settings_ = ([stride, stride], [kernel // 2, kernel // 2], [1, 1], groups, "relu")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        y = OP.masked_conv2d(x, weight, None, None, None, live_out, *settings_)
        grad_y = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, weight), grad_y)
    finally:
        torch.set_num_threads(before)
    wide = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = reference.masked_conv2d(*wide, None, None, None, live_out, *settings_)
    # The reference's own sign at values that float32 rounds to the other side of zero would be another gradient.
    mask = (y > 0).double()
    linear = reference.masked_conv2d(*wide, None, None, None, live_out, *settings_[:-1], "none")
    expected_grads = torch.autograd.grad(linear, wide, grad_y.double() * mask)
    assert error(y, expected) < TOLERANCE[torch.float32]
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert error(grad, wanted) < TOLERANCE[torch.float32]


def test_threads_do_not_write_into_each_others_gradients(target: torch.device) -> None:
    """Live channels are picked by whole vectors, which reach beyond the row: the next row may be another thread's."""
    generator = torch.Generator().manual_seed(0)
    live = torch.tensor([0, *range(2, 11), *range(12, 40), 41, 43, 45, 46, 48], device=target)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((6, 20, 9, 8), (49, 20, 1, 1)))
    grad_y = torch.randn(6, 49, 9, 8, generator=generator).to(memory_format=torch.channels_last).to(target)
    x = x.to(memory_format=torch.channels_last).to(target)
    weight = weight.to(target)
    before = torch.get_num_threads()

    def gradients() -> list[torch.Tensor]:
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
        settings = ([1, 1], [0, 0], [1, 1], 1, "sigmoid")
        y = OP.masked_conv2d(*leaves, None, None, None, live, *settings)
        return list(torch.autograd.grad(y, leaves, grad_y))

    try:
        torch.set_num_threads(1)
        alone = gradients()
        torch.set_num_threads(4)
        for _ in range(100):
            for grad, expected in zip(gradients(), alone, strict=True):
                assert error(grad, expected) < TOLERANCE[torch.float32]
    finally:
        torch.set_num_threads(before)
