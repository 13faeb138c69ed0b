"""masked_batch_norm_act against nn.BatchNorm2d and the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import ops
from lightning_prune.ops import reference_norm
from tests.ops.conv_cases import error, off_kinks

OP = torch.ops.lightning_prune
NAMES = ("x", "residual", "weight", "bias", "gate")


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    batch=st.sampled_from([1, 2, 5]),
    channels=st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64, 70, 130]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    activation=st.sampled_from(sorted(ops.ACTIVATIONS)),
    training=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_output_and_gradients_match_the_reference(
    target: torch.device,
    data: st.DataObject,
    dtype: torch.dtype,
    batch: int,
    channels: int,
    size: tuple[int, int],
    activation: str,
    training: bool,
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    shape = (batch, channels, *size)

    def map_(offset: float = 0.0) -> torch.Tensor:
        kind = data.draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
        if kind == "strided":
            wide = torch.randn(batch, channels, size[0], 2 * size[1], generator=generator, dtype=dtype)
            return (wide[..., ::2] + offset).to(target)
        t = (torch.randn(shape, generator=generator, dtype=dtype) + offset).to(target)
        return t.to(memory_format=torch.channels_last) if kind == "channels_last" else t

    def vector() -> torch.Tensor | None:
        wanted = data.draw(st.booleans())
        return torch.randn(channels, generator=generator, dtype=dtype).to(target) if wanted else None

    x, grad = map_(offset=data.draw(st.sampled_from([0.0, 3.0]))), map_()
    residual = map_() if data.draw(st.booleans()) else None
    given_ = [x, residual, vector(), vector(), vector()]
    live = None
    if data.draw(st.booleans()):
        live = torch.tensor(
            sorted(data.draw(st.sets(st.integers(0, channels - 1)))), dtype=torch.int64, device=target
        )
    statistics = (None, None)
    if not training:
        statistics = (torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5)
    # Few equal values have hardly a variance, and 1 / sqrt(var) blows rounding up: a larger eps keeps the question fair.
    shared = (live, 0.1, activation)
    own = [t if t is None else t.detach().clone().requires_grad_() for t in given_]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in given_]
    found = OP.masked_batch_norm_act(*own, *(s if s is None else s.to(target) for s in statistics), *shared)
    expected = reference_norm.masked_batch_norm_act(
        *wide, *(s if s is None else s.double().to(target) for s in statistics), *shared
    )
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < tolerance
    before, *_ = reference_norm.masked_batch_norm_act(
        *wide, *(s if s is None else s.double().to(target) for s in statistics), *shared[:-1], "none"
    )
    grad = off_kinks(grad, before, activation, tolerance)
    leaves = [t for t in own if t is not None]
    grads = torch.autograd.grad(found[0], leaves, grad)
    exact = torch.autograd.grad(
        expected[0], [t for t in wide if t is not None], grad.double(), allow_unused=True
    )
    for a, b, leaf in zip(grads, exact, leaves, strict=True):
        assert a.shape == leaf.shape
        assert error(a, torch.zeros_like(leaf).double() if b is None else b) < 10 * tolerance
    if live is not None:
        dead = torch.ones(channels, dtype=torch.bool, device=target).index_fill(0, live, False)
        assert not grads[0][:, dead].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_half_maps_with_float32_parameters(target: torch.device, dtype: torch.dtype, last: bool) -> None:
    x, residual, grad = (torch.randn(4, 37, 9, 8, device=target).to(dtype) for _ in range(3))
    if last:
        x, residual, grad = (t.to(memory_format=torch.channels_last) for t in (x, residual, grad))
    vectors = [torch.randn(37, device=target) for _ in range(3)]
    live = torch.tensor([0, 3, 4, 36], device=target)
    if target.type == "cpu":
        assert not ops.availability.can_run_masked_batch_norm_act(x).ok
        with pytest.raises(RuntimeError, match="float32 or float64, on CUDA also float16 or bfloat16"):
            OP.masked_batch_norm_act(x, residual, *vectors, None, None, live, 0.1, "silu")
        return
    leaves = [t.clone().requires_grad_() for t in (x, residual, *vectors)]
    exact_leaves = [t.double().requires_grad_() for t in (x, residual, *vectors)]
    found = OP.masked_batch_norm_act(*leaves, None, None, live, 0.1, "silu")
    exact = reference_norm.masked_batch_norm_act(*exact_leaves, None, None, live, 0.1, "silu")
    assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
    grads = torch.autograd.grad(found[0], leaves, grad)
    exact_grads = torch.autograd.grad(exact[0], exact_leaves, grad.double())
    bound = {torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    for a, b in zip((*found, *grads), (*exact, *exact_grads), strict=True):
        assert error(a, b) < (bound if a.dim() == 4 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_computes_halves_in_float32(dtype: torch.dtype) -> None:
    x, residual, grad = (torch.randn(3, 5, 4, 4).to(dtype) for _ in range(3))
    weight = torch.randn(5)
    y, mean, var = reference_norm.masked_batch_norm_act(
        x, residual, weight, None, None, None, None, None, 0.1, "silu"
    )
    wide = reference_norm.masked_batch_norm_act(
        x.float(), residual.float(), weight, None, None, None, None, None, 0.1, "silu"
    )
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    assert torch.equal(y, wide[0].to(dtype))
    settings_ = (None, True, 0.1, "silu", True, True, True, False, False)
    grads = reference_norm.masked_batch_norm_act_backward(
        grad, x, residual, weight, None, None, mean, var, *settings_
    )
    wide_grads = reference_norm.masked_batch_norm_act_backward(
        grad.float(), x.float(), residual.float(), weight, None, None, mean, var, *settings_
    )
    for a, b in zip(grads, wide_grads, strict=True):
        assert torch.equal(a, b.to(a.dtype))
    assert [g.dtype for g in grads[:3]] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_it_is_batch_norm_2d(target: torch.device, last: bool, momentum: float) -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(21, momentum=momentum, device=target)
    nn.init.normal_(layer.weight)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for training in (True, True, False):
        layer.train(training)
        x = torch.randn(6, 21, 9, 5, device=target) * 3 + 100
        x = x.to(memory_format=torch.channels_last) if last else x
        expected = F.relu(layer(x))
        y = ops.masked_batch_norm_act(
            x,
            mean,
            var,
            layer.weight,
            layer.bias,
            training=training,
            momentum=momentum,
            eps=layer.eps,
            activation="relu",
        )
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean, layer.running_mean)
        torch.testing.assert_close(var, layer.running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", sorted(ops.ACTIVATIONS))
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(target: torch.device, activation: str, training: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(target).requires_grad_()

    inputs = (leaf(2, 5, 3, 2), leaf(2, 5, 3, 2), leaf(5), leaf(5), leaf(5))
    statistics = (
        (None, None)
        if training
        else (leaf(5).detach(), torch.rand(5, dtype=torch.float64, device=target) + 1)
    )
    live = torch.tensor([0, 2, 3], device=target)
    assert torch.autograd.gradcheck(
        lambda *t: OP.masked_batch_norm_act(*t, *statistics, live, 1e-5, activation)[0], inputs
    )


@pytest.mark.parametrize("activation", sorted(ops.ACTIVATIONS))
def test_the_closed_form_of_the_reference(activation: str) -> None:
    generator = torch.Generator().manual_seed(4)
    maps = [torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    vectors = [torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3)]
    leaves = [t.requires_grad_() for t in (*maps[:2], *vectors)]
    live = torch.tensor([1, 3])
    y, mean, var = reference_norm.masked_batch_norm_act(*leaves, None, None, live, 1e-3, activation)
    expected = torch.autograd.grad(y, leaves, maps[2])
    found = reference_norm.masked_batch_norm_act_backward(
        maps[2],
        *(t.detach() for t in leaves),
        mean.detach(),
        var.detach(),
        live,
        True,
        1e-3,
        activation,
        *([True] * 5),
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("last", [False, True])
def test_dead_channels_are_not_read(target: torch.device, last: bool) -> None:
    x, live = torch.randn(2, 20, 3, 3, device=target), torch.tensor([0, 3, 18], device=target)
    x[:, [1, 19]] = float("nan")
    if last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    mean, var = torch.ones(20, device=target), torch.ones(20, device=target)
    y = ops.masked_batch_norm_act(x, mean, var, live=live, momentum=0.25, activation="sigmoid")
    dead = torch.ones(20, dtype=torch.bool, device=target).index_fill(0, live, False)
    assert (y[:, dead] == 0.5).all()  # sigmoid(0)
    assert (mean[dead] == 0.75).all()
    assert (var[dead] == 0.75).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not grad[:, dead].any()
    torch.testing.assert_close(
        y[:, live].detach(), torch.sigmoid(F.batch_norm(x[:, live].detach(), None, None, training=True))
    )


def test_a_large_mean_does_not_cancel_the_variance(target: torch.device) -> None:
    x = torch.randn(8, 6, 20, 20, device=target, generator=torch.Generator().manual_seed(1)) + 1000
    for t in (x, x.to(memory_format=torch.channels_last)):
        y, mean, var = OP.masked_batch_norm_act(t, None, None, None, None, None, None, None, 1e-5, "none")
        expected = F.batch_norm(x.double(), None, None, training=True)
        assert float((y.double() - expected).abs().max()) < 1e-4  # x itself is rounded to 6e-5
        torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["plain", "channels_last", "residual", "eval", "empty"])
def test_opcheck(target: torch.device, case: str) -> None:
    x = torch.randn(0 if case == "empty" else 2, 6, 3, 4, device=target)
    x = x.to(memory_format=torch.channels_last) if case == "channels_last" else x
    x.requires_grad_()
    weight, bias, gate = (torch.randn(6, device=target, requires_grad=True) for _ in range(3))
    residual = torch.randn(2, 6, 3, 4, device=target, requires_grad=True) if case == "residual" else None
    statistics = (
        (torch.zeros(6, device=target), torch.ones(6, device=target)) if case == "eval" else (None,) * 2
    )
    live = torch.tensor([0, 2, 5], device=target)
    arguments = (x, residual, weight, bias, gate, *statistics, live, 1e-5, "relu")
    torch.library.opcheck(OP.masked_batch_norm_act, arguments)
    plain = [None if t is None else t.detach() for t in (x, residual, weight, bias, gate)]
    moments = (torch.zeros(6, device=target), torch.ones(6, device=target))
    needs = (True, residual is not None, True, False, True)
    torch.library.opcheck(
        OP.masked_batch_norm_act_backward,
        (torch.ones_like(plain[0]), *plain, *moments, live, case != "eval", 1e-5, "relu", *needs),
    )


def test_threads_do_not_change_the_numbers(target: torch.device) -> None:
    x = torch.randn(16, 24, 16, 16, device=target).to(memory_format=torch.channels_last).requires_grad_()
    results: list[Any] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = ops.masked_batch_norm_act(x, activation="relu")
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_autocast_and_compile(target: torch.device) -> None:
    x, weight = torch.randn(2, 4, 3, 3, device=target), torch.randn(4, device=target, requires_grad=True)
    with torch.autocast(target.type, dtype=torch.bfloat16):
        wanted = torch.float32 if target.type == "cpu" else torch.bfloat16
        assert ops.masked_batch_norm_act(x.bfloat16()).dtype == wanted

    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.masked_batch_norm_act(x, weight=weight, activation="silu").square().sum()

    (expected,) = torch.autograd.grad(step(x), weight)
    (actual,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), weight)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x must be 4-D.*\(3, 4\)"),
        ({"x": torch.zeros(1, 4, 2, 2, dtype=torch.int32)}, "float32 or float64, on CUDA also.*; got int32"),
        (
            {"residual": torch.zeros(1, 4, 2, 1)},
            r"residual must be float32 of shape \(1, 4, 2, 2\) like x; got.*\(1, 4, 2, 1\)",
        ),
        ({"weight": torch.zeros(3)}, r"weight must have shape \(4\).*got \(3\)"),
        ({"mean": torch.zeros(4)}, "give both mean and var"),
        ({"live": torch.tensor([1, 0])}, "live must be sorted and unique"),
        ({"eps": -1.0}, "eps must not be negative; got -1"),
        ({"activation": "tanh"}, "activation must be one of none, relu.*got 'tanh'"),
    ],
)
def test_bad_arguments_name_expected_and_actual(change: dict[str, object], message: str) -> None:
    if not ops.extension_available():
        pytest.skip("messages of the compiled operator")
    arguments: dict[str, object] = dict.fromkeys((*NAMES, "mean", "var", "live"))
    arguments |= {"x": torch.zeros(1, 4, 2, 2), "eps": 1e-5, "activation": "none"}
    with pytest.raises(RuntimeError, match=message):
        OP.masked_batch_norm_act(*{**arguments, **change}.values())
    with pytest.raises(ValueError, match="both running_mean and running_var"):
        ops.masked_batch_norm_act(torch.zeros(1, 4, 2, 2), running_mean=torch.zeros(4))
