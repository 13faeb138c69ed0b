"""Winograd in the trainable convolution: forward and both gradients against float64."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.nn import MaskedConv2d
from lightning_prune.ops import reference
from lightning_prune.ops.error_bounds import ERROR_BOUNDS, ErrorBound, error_bound
from tests.ops.accuracy_cases import KINDS, inputs_of, weights_of
from tests.ops.conv_cases import error

OP = torch.ops.lightning_prune
CHANNELS = st.sampled_from([1, 2, 7, 8, 9, 13, 16, 17, 31, 33, 40, 49])


def on_cpu(target: torch.device) -> None:
    if target.type == "cuda":
        pytest.skip("Winograd is the CPU's")


def live_channels(data: st.DataObject, count: int) -> torch.Tensor | None:
    kind = data.draw(st.sampled_from(["all", "run", "some"]))
    if kind == "all":
        return None
    if kind == "run":
        return torch.arange(count // 3, count)
    return torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=count))), dtype=torch.int64
    )


@given(
    data=st.data(),
    algorithm=st.sampled_from(["winograd2", "winograd4"]),
    batch=st.sampled_from([1, 2, 5, 33]),
    inputs=CHANNELS,
    outputs=CHANNELS,
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forward_and_gradients_match_the_reference(
    target: torch.device,
    data: st.DataObject,
    algorithm: str,
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    on_cpu(target)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    height, width = (max(s, 3 - 2 * p) for s, p in zip(size, padding, strict=True))
    x = torch.randn(batch, inputs, height, width, generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (3 * inputs**0.5)
    if data.draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    if data.draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    bias, gate = (
        torch.randn(outputs, generator=generator) if data.draw(st.booleans()) else None for _ in range(2)
    )
    live_in, live_out = live_channels(data, inputs), live_channels(data, outputs)
    shared = ([1, 1], list(padding), [1, 1], 1)
    own = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, gate)]
    wide = [t if t is None else t.double().requires_grad_() for t in (x, weight, bias, gate)]
    y = OP.masked_conv2d(*own, live_in, live_out, *shared, "none", algorithm)
    expected = reference.masked_conv2d(*wide, live_in, live_out, *shared)
    assert error(y, expected) < 2e-5
    grad = torch.randn(y.shape, generator=generator)
    grads = torch.autograd.grad(y, [t for t in own if t is not None], grad)
    exact = torch.autograd.grad(expected, [t for t in wide if t is not None], grad.double())
    for found, wanted in zip(grads, exact, strict=True):
        assert error(found, wanted) < 2e-5
    for found, index, dim in ((grads[0], live_in, 1), (grads[1], live_out, 0), (grads[1], live_in, 1)):
        if index is not None:
            dead = [c for c in range(found.shape[dim]) if c not in index]
            assert not found.index_select(dim, torch.tensor(dead, dtype=torch.int64)).any()


# (batch, inputs, outputs, side of the map); the last ones for "auto" and "direct" alone: tiles would be mostly padding
ACCURACY = [
    (1, 400, 24, 14),
    (24, 24, 40, 16),
    (40, 16, 17, 7),
    (64, 12, 12, 32),
    (16, 64, 32, 2),
    (16, 3, 16, 32),
]
#: channels_last, with AVX-512 a tile in each lane from 4 channels on
LANES = [(16, 4, 4, 16), (16, 5, 16, 14), (8, 16, 9, 30)]
UNIT = 2.0**-24


def factors(algorithm: str) -> tuple[str, float]:
    """The algorithm whose bounds hold, and how much it amplifies a rounding."""
    name = "winograd4" if algorithm == "auto" else algorithm
    return name, 1.0 if name == "direct" else ERROR_BOUNDS[name, 3].worst


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "relu"])
@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd2", "winograd4"])
def test_accuracy_is_what_the_docstring_states(target: torch.device, kind: str, algorithm: str) -> None:
    on_cpu(target)
    generator = torch.Generator().manual_seed(5)
    name, worst = factors(algorithm)
    for batch, channels, outputs, size in LANES + (
        ACCURACY if algorithm in ("auto", "direct") else ACCURACY[:4]
    ):
        x = inputs_of(kind, (batch, channels, size, size), generator)
        grad = inputs_of(kind, (batch, outputs, size, size), generator)
        weights = kind if kind in ("positive", "constant") else "normal"
        weight = weights_of(weights, (outputs, channels, 3, 3), generator)
        if (batch, channels, outputs, size) in LANES:
            x, weight, grad = (t.to(memory_format=torch.channels_last) for t in (x, weight, grad))
        shared = ([1, 1], [1, 1], [1, 1], 1, "none")
        y = OP.masked_conv2d(x, weight, None, None, None, None, *shared, algorithm)
        grads = OP.masked_conv2d_backward(
            grad, None, x, weight, None, None, None, None, *shared, True, True, False, False, algorithm
        )
        wide = [t.double() for t in (x, weight, grad)]
        pixels = batch * size**2
        # of the output, the gradient of the input and that of the weight: usual and for every input, and what these multiply
        bounds = [
            error_bound((outputs, channels, 3, 3), "direct"),
            error_bound((channels, outputs, 3, 3), "direct"),
        ]
        if name != "direct":
            bounds = [
                ErrorBound(max(a.usual, b.usual), max(a.worst, b.worst))
                for a, b in zip(
                    bounds, (error_bound((1, c, 3, 3), name) for c in (channels, outputs)), strict=True
                )
            ]
        bounds.append(ErrorBound(2e-6, worst * (pixels + 32) * UNIT))
        sums = [wide[1].abs().sum((1, 2, 3)), wide[1].abs().sum((0, 2, 3)), wide[2].abs().sum((0, 2, 3))]
        with_largest = (x, grad, x)
        for part, (found, bound) in enumerate(zip((y, *grads[:2]), bounds, strict=True)):
            exact, products = exact_part(part, *wide), exact_part(part, *(t.abs() for t in wide)).max()
            worst_error = float((found.double() - exact).abs().max())
            largest = float(with_largest[part].abs().max()) * float(sums[part].max())
            assert worst_error <= bound.worst * (float(products) if name == "direct" else largest)
            if kind != "constant":
                assert worst_error <= bound.usual * float(products), (part, batch, size)


def test_from_which_channel_on_auto_is_winograd(target: torch.device) -> None:
    on_cpu(target)
    lanes = os.environ["LIGHTNING_PRUNE_CPU_LEVEL"] == "avx512"
    for channels, last, winograd in (
        (3, True, False),
        (5, True, lanes),
        (11, True, lanes),
        (4, False, False),
        (11, False, False),
        (12, True, True),
        (12, False, True),
    ):
        x, weight = torch.randn(4, channels, 32, 32), torch.randn(channels, channels, 3, 3)
        if last:
            x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
        shared = (None, None, None, None, [1, 1], [1, 1], [1, 1], 1, "none")
        transformed = OP.masked_conv2d(x, weight, *shared, "winograd4")
        assert torch.equal(ops.masked_conv2d(x, weight, padding=1), transformed) == winograd, (channels, last)


def exact_part(part: int, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    if part == 0:
        return F.conv2d(x, weight, padding=1)
    if part == 1:
        return torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=1)
    return torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=1)


def test_exact_never_takes_winograd(target: torch.device) -> None:
    on_cpu(target)
    x, weight = torch.randn(2, 32, 16, 16), torch.randn(32, 32, 3, 3)
    shared = ([1, 1], [1, 1], [1, 1], 1, "none")
    direct = OP.masked_conv2d(x, weight, None, None, None, None, *shared, "direct")
    assert torch.equal(ops.masked_conv2d(x, weight, padding=1, exact=True), direct)
    assert not torch.equal(ops.masked_conv2d(x, weight, padding=1), direct)
    module = MaskedConv2d(32, 32, 3, padding=1, bias=False, exact=True)
    module.weight.data = weight
    assert torch.equal(module(x), direct)
    grads = [
        ops.masked_conv2d_backward(x, None, x, weight, padding=1, exact=exact)[:2] for exact in (True, False)
    ]
    expected = OP.masked_conv2d_backward(
        x, None, x, weight, None, None, None, None, *shared, True, True, False, False, "direct"
    )
    for i in range(2):
        assert torch.equal(grads[0][i], expected[i])
        assert not torch.equal(grads[1][i], expected[i])


def test_many_threads_give_the_same_numbers(target: torch.device) -> None:
    on_cpu(target)
    x, weight, grad = torch.randn(7, 19, 14, 14), torch.randn(21, 19, 3, 3), torch.randn(7, 21, 14, 14)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [ops.masked_conv2d_backward(grad, None, x, weight, padding=1) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert error(runs[0][1], expected) < 2e-5
    for grad_x, grad_weight, _, _ in runs[1:]:
        assert torch.equal(grad_x, runs[0][0])
        assert torch.equal(grad_weight, runs[0][1])


def test_algorithm_is_checked_and_traced(target: torch.device) -> None:
    x = torch.randn(2, 16, 8, 8, device=target)
    weight = torch.randn(16, 16, 3, 3, device=target, requires_grad=True)
    shared = (None, None, None, None, [1, 1], [1, 1], [1, 1], 1, "relu")
    torch.library.opcheck(OP.masked_conv2d, (x.requires_grad_(), weight, *shared, "winograd4"))
    with pytest.raises(RuntimeError, match="algorithm must be one of auto, direct.*got 'fft'"):
        OP.masked_conv2d(x, weight, *shared, "fft")


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    groups=st.sampled_from([1, 2, 20]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    last=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_gate_of_the_inputs(
    target: torch.device,
    data: st.DataObject,
    dtype: torch.dtype,
    groups: int,
    kernel: int,
    stride: int,
    last: bool,
) -> None:
    on_cpu(target)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    outputs = 40 if groups == 20 else 34
    x, weight, gate = randn(3, 20, 9, 9), randn(outputs, 20 // groups, kernel, kernel), randn(20)
    bias, out_gate = randn(outputs), randn(outputs)
    live = [live_channels(data, 20), live_channels(data, outputs)]
    if last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    shared = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups, "none")
    leaves = [t.requires_grad_() for t in (x, weight, bias, out_gate, gate)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = OP.masked_conv2d(*leaves[:4], *live, *shared, "auto", leaves[4])
    expected = reference.masked_conv2d(wide[0] * wide[4][:, None, None], *wide[1:4], *live, *shared)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert error(y, expected) < tolerance
    grad = randn(*y.shape)
    for a, b in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, wide, grad.double()), strict=True
    ):
        assert error(a, b) < tolerance


def test_a_gate_of_the_inputs_is_checked(target: torch.device) -> None:
    on_cpu(target)
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    shared = (None, None, None, None, [1, 1], [1, 1], [1, 1], 1, "relu", "auto")
    torch.library.opcheck(OP.masked_conv2d, (x, weight, *shared, torch.rand(4, requires_grad=True)))
    with pytest.raises(
        RuntimeError, match=r"in_gate must be float32 of shape \(4\).*got float32 of shape \(3\)"
    ):
        OP.masked_conv2d(x, weight, *shared, torch.rand(3))
