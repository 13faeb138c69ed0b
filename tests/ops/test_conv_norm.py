"""Convolution and batch norm as one operator, against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import ops
from lightning_prune.ops.reference_conv_norm import masked_conv_norm_act
from tests.ops.conv_cases import error, off_kinks

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
OP = torch.ops.lightning_prune


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    channels=st.sampled_from([(1, 5), (3, 4), (4, 4), (6, 17), (16, 9)]),
    size=st.tuples(st.integers(3, 9), st.sampled_from([3, 8, 12])),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    compact=st.booleans(),
    last=st.booleans(),
    activation=st.sampled_from(["none", "relu", "silu"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_operator_is_its_definition(
    data: st.DataObject,
    dtype: torch.dtype,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: int,
    stride: int,
    compact: bool,
    last: bool,
    activation: str,
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    some = st.booleans()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def subset(count: int) -> Tensor | None:
        if data.draw(some):
            return None
        return torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))

    inputs, outputs = channels
    live_in, live_out = subset(inputs), subset(outputs)
    map_in = len(live_in) if compact and live_in is not None else inputs
    map_out = len(live_out) if compact and live_out is not None else outputs
    geometry = [stride, stride, kernel // 2, kernel // 2, 1, 1, 1]
    x = randn(3, map_in, *size)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    spatial = [(s + 2 * (kernel // 2) - kernel) // stride + 1 for s in size]
    residual = randn(3, map_out, *spatial) if data.draw(some) else None
    vectors = [randn(n) if data.draw(some) else None for n in (outputs, inputs, outputs, outputs)]
    tensors = (
        x, randn(outputs, inputs, kernel, kernel), vectors[0], vectors[1], vectors[2], vectors[3], residual,
    )  # fmt: skip
    live, of = (live_out, outputs) if compact and live_out is not None else (None, 0)

    def arguments(t: Any, statistics: Any, act: str = activation) -> tuple[Any, ...]:
        lists = (live_in, live_out, compact, geometry)
        return (*t[:4], *lists, t[6], t[4], t[5], live, of, 0.1, act, *statistics, 0.3)

    wide = [None if t is None else t.double().requires_grad_() for t in tensors]
    moving = [randn(outputs), randn(outputs), torch.tensor(4)]
    moved = [moving[0].double(), moving[1].double(), torch.tensor(4)]
    expected = masked_conv_norm_act(*arguments(wide, moved))
    found = OP.masked_conv_norm_act(*arguments(tensors, moving))
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    for a, b in zip((*found, *moving), (*expected, *moved), strict=True):
        assert a.shape == b.shape
        assert error(a, b) < tolerance

    before = masked_conv_norm_act(*arguments(wide, (None, None, None), "none"))[0]
    grad = off_kinks(randn(*expected[0].shape), before, activation, tolerance)
    leaves = [t for t in wide if t is not None]
    wanted = iter(torch.autograd.grad(expected[0], leaves, grad.double(), allow_unused=True))
    needs = [t is not None and data.draw(some) for t in tensors]
    bits = sum(1 << i for i, need in enumerate(needs) if need)
    grads = OP.masked_conv_norm_act_backward(grad, *found[1:], *arguments(tensors, (0,))[:-2], bits)
    for a, tensor, need in zip(grads, tensors, needs, strict=True):
        b = None if tensor is None else next(wanted)
        if need:
            assert a.shape == tensor.shape
            assert error(a, torch.zeros_like(a) if b is None else b) < 20 * tolerance
        else:
            assert a.numel() == 0


def _some() -> tuple[Any, ...]:
    live = torch.tensor([0, 2, 3])
    x, weight = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(4, 4, 3, 3, dtype=torch.float64)
    vectors = [torch.rand(4, dtype=torch.float64) for _ in range(6)]
    residual = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    lists = (live, live, True, [1, 1, 1, 1, 1, 1, 1])
    norm = (residual, vectors[2], vectors[3], live, 4, 1e-3, "silu")
    return (x, weight, *vectors[:2], *lists, *norm, vectors[4], vectors[5], torch.tensor(0), 0.1)


def test_opcheck() -> None:
    arguments = _some()
    torch.library.opcheck(OP.masked_conv_norm_act, arguments)
    y, *kept = OP.masked_conv_norm_act(*arguments)
    torch.library.opcheck(
        OP.masked_conv_norm_act_backward, (torch.ones_like(y), *kept, *arguments[:15], 0b1111111)
    )


def test_bad_arguments_name_expected_and_actual() -> None:
    arguments = list(_some())
    with pytest.raises(RuntimeError, match=r"geometry must have 7 numbers.*got 2"):
        OP.masked_conv_norm_act(*arguments[:7], [1, 1], *arguments[8:])
    with pytest.raises(RuntimeError, match="both running_mean and running_var"):
        OP.masked_conv_norm_act(*arguments[:15], None, *arguments[16:])
