"""Maps of live channels only, parameters of all: the live part of what full maps give, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.ops import reference, reference_norm
from tests.ops.conv_cases import TOLERANCE, ConvCase, conv_cases, error, off_kinks
from tests.ops.test_cuda_index_emulation import part

OP = torch.ops.lightning_prune
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(case=conv_cases(), algorithm=st.sampled_from(["auto", "direct"]), in_gated=st.booleans())
@RELAXED
def test_convolution(target: torch.device, case: ConvCase, algorithm: str, in_gated: bool) -> None:
    x, weight, bias, gate, live_in, live_out = case.tensors(target)
    in_gate = case.randn(case.inputs).to(target) if in_gated else None
    wide = [
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, gate, in_gate)
    ]
    factors = None if wide[4] is None else wide[4][:, None, None]
    inputs = wide[0] if factors is None else wide[0] * factors
    expected = reference.masked_conv2d(inputs, *wide[1:4], live_in, live_out, *case.settings)
    before = reference.masked_conv2d(inputs, *wide[1:4], live_in, live_out, *case.settings[:-1], "none")
    grad_y = off_kinks(case.randn(*expected.shape).to(target), before, case.activation, TOLERANCE[case.dtype])
    wanted = torch.autograd.grad(
        expected, [t for t in wide if t is not None], grad_y.double(), allow_unused=True
    )
    own = [part(x, live_in), weight, bias, gate, in_gate]
    leaves = [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in own
    ]
    y = OP.masked_conv2d(*leaves[:4], live_in, live_out, *case.settings, algorithm, leaves[4], True)
    expected_y = part(expected, live_out)
    assert y.shape == expected_y.shape
    assert error(y, expected_y) < TOLERANCE[case.dtype]
    present = [t for t in leaves if t is not None]
    found = torch.autograd.grad(y, present, part(grad_y, live_out))
    for leaf, a, b in zip(present, found, wanted, strict=True):
        b = torch.zeros(a.shape, dtype=torch.float64, device=target) if b is None else b
        assert a.shape == leaf.shape
        assert (
            error(a, part(b, live_in) if leaf is leaves[0] and b.shape != a.shape else b)
            < TOLERANCE[case.dtype]
        )


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    channels=st.sampled_from([1, 2, 3, 4, 8, 13, 16, 17, 33, 70]),
    batch=st.sampled_from([1, 3, 16]),
    size=st.tuples(st.integers(1, 9), st.sampled_from([1, 4, 7, 16])),
    activation=st.sampled_from(sorted(ops.ACTIVATIONS)),
    last=st.booleans(),
)
@RELAXED
def test_norm(
    target: torch.device,
    data: st.DataObject,
    dtype: torch.dtype,
    channels: int,
    batch: int,
    size: tuple[int, int],
    activation: str,
    last: bool,
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    live = torch.tensor(sorted(data.draw(st.sets(st.integers(0, channels - 1), min_size=1))), device=target)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(target)

    x, grad = randn(batch, channels, *size) + 2, randn(batch, channels, *size)
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight, bias = (randn(channels) if data.draw(st.booleans()) else None for _ in range(2))
    wide = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    expected = reference_norm.masked_batch_norm_act(
        wide[0], None, *wide[1:], None, None, None, live, 0.1, activation
    )
    own = [None if t is None else t.clone().requires_grad_() for t in (part(x, live), weight, bias)]
    arguments: tuple[Any, ...] = (None, *own[1:], None, None, None, live, 0.1, activation, channels)
    found = OP.masked_batch_norm_act(own[0], *arguments)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for a, b in zip(found, (part(expected[0], live), *expected[1:]), strict=True):
        assert a.shape == b.shape
        assert error(a, b) < tolerance
    again = reference_norm.masked_batch_norm_act(
        own[0].detach().double(),
        *[
            t.detach().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in arguments
        ],
    )
    for a, b in zip(again, expected, strict=True):  # the fallback takes the same maps
        assert error(a, part(b, live) if b.dim() == 4 else b) < 1e-11
    before, *_ = reference_norm.masked_batch_norm_act(
        wide[0], None, *wide[1:], None, None, None, live, 0.1, "none"
    )
    grad = off_kinks(grad, before, activation, tolerance)
    wanted = torch.autograd.grad(expected[0], [t for t in wide if t is not None], grad.double())
    grads = torch.autograd.grad(found[0], [t for t in own if t is not None], part(grad, live))
    for a, b in zip(grads, wanted, strict=True):
        assert error(a, part(b, live) if b.dim() == 4 else b) < 10 * tolerance


@pytest.mark.parametrize("groups", [1, 6])
def test_convolution_opcheck_and_gradcheck(target: torch.device, groups: int) -> None:
    live = torch.tensor([0, 2, 3, 5], device=target)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, device=target, requires_grad=True)
    weight = torch.randn(6, 6 // groups, 3, 3, dtype=torch.float64, device=target, requires_grad=True)
    bias, in_gate = (torch.randn(6, dtype=torch.float64, device=target, requires_grad=True) for _ in range(2))
    shared = (None, live, live, [1, 2], [1, 0], [1, 1], groups, "silu", "auto")
    torch.library.opcheck(OP.masked_conv2d, (x, weight, bias, *shared, in_gate, True))
    assert torch.autograd.gradcheck(
        lambda *t: OP.masked_conv2d(*t[:3], *shared, t[3], True), (x, weight, bias, in_gate)
    )
    y = OP.masked_conv2d(x, weight, bias, *shared[:-2], "none", "auto", in_gate, True).detach()
    plain = [t.detach() for t in (x, weight, bias)]
    torch.library.opcheck(
        OP.masked_conv2d_backward,
        (
            torch.ones_like(y),
            y,
            *plain,
            *shared[:-1],
            True,
            True,
            True,
            False,
            "auto",
            in_gate.detach(),
            True,
            True,
        ),
    )


def test_norm_opcheck_and_gradcheck(target: torch.device) -> None:
    live = torch.tensor([1, 2, 4], device=target)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, device=target, requires_grad=True)
    weight, bias, gate = (
        torch.randn(6, dtype=torch.float64, device=target, requires_grad=True) for _ in range(3)
    )
    shared = (None, None, live, 1e-3, "sigmoid", 6)
    torch.library.opcheck(OP.masked_batch_norm_act, (x, None, weight, bias, gate, *shared))
    assert torch.autograd.gradcheck(
        lambda *t: OP.masked_batch_norm_act(t[0], None, *t[1:], *shared)[0], (x, weight, bias, gate)
    )
    plain = [t.detach() for t in (weight, bias, gate)]
    moments = (
        torch.zeros(6, dtype=torch.float64, device=target),
        torch.ones(6, dtype=torch.float64, device=target),
    )
    torch.library.opcheck(
        OP.masked_batch_norm_act_backward,
        (torch.ones_like(x.detach()), x.detach(), None, *plain, *moments, live, True, 1e-3, "sigmoid",
         True, False, True, True, True, 6),
    )  # fmt: skip


def test_bad_arguments_name_expected_and_actual(target: torch.device) -> None:
    live = torch.tensor([0, 2], device=target)
    x, weight = torch.ones(1, 3, 4, 4, device=target), torch.ones(2, 3, 1, 1, device=target)
    settings_ = ([1, 1], [0, 0], [1, 1], 1, "none", "auto")
    with pytest.raises(RuntimeError, match=r"one channel for each of live_in, 2; got shape \(1, 3, 4, 4\)"):
        OP.masked_conv2d(x, weight, None, None, live, None, *settings_, None, True)
    with pytest.raises(RuntimeError, match=r"one channel for each of live; got x of shape \(1, 3, 4, 4\)"):
        OP.masked_batch_norm_act(
            torch.ones(1, 3, 4, 4, device=target), None, None, None, None, None, None, live, 1e-3, "none", 6
        )
    assert ops.extension_available()
