"""The optimizer of the l1 gates against its formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.gates.optim import SharedScaleAdam


def trajectory(grads: torch.Tensor, **options: float) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(grads.shape[1], dtype=grads.dtype))
    optimizer = SharedScaleAdam([parameter], **options)
    points = []
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        points.append(parameter.detach().clone())
    return torch.stack(points)


def test_a_step_is_the_mean_over_the_common_scale() -> None:
    """Written out by hand in float64: bias-corrected means, one second moment over the live elements, a limit per step."""
    torch.manual_seed(0)
    grads = torch.randn(30, 5, dtype=torch.float64) * torch.tensor(
        [0.01, 0.1, 1.0, 10.0, 0.0], dtype=torch.float64
    )
    got = trajectory(grads, lr=0.1, clip=1.5)
    value = [1.0] * 5
    mean, square = [0.0] * 5, 0.0
    for t, grad in enumerate(grads.tolist(), start=1):
        live = [g for g in grad if g != 0]
        square = 0.99 * square + 0.01 * sum(g * g for g in live) / len(live)
        scale = (square / (1 - 0.99**t)) ** 0.5
        for i, g in enumerate(grad):
            mean[i] = 0.9 * mean[i] + 0.1 * g
            value[i] -= 0.1 * min(max(mean[i] / (1 - 0.9**t) / scale, -1.5), 1.5)
    assert torch.allclose(got[-1], torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-9)


@given(st.floats(-6, 6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_scale_of_the_loss_does_not_matter(exponent: float, seed: int) -> None:
    grads = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(trajectory(grads, lr=0.05), trajectory(grads * 10.0**exponent, lr=0.05), atol=1e-6)


def test_gates_that_matter_more_are_pulled_harder() -> None:
    """Adam would move both alike: their signs are equally sure."""
    grads = torch.tensor([[-1.0, -0.1]], dtype=torch.float64).repeat(20, 1)
    moved = trajectory(grads, lr=0.01)[-1] - 1
    assert moved[0] / moved[1] == pytest.approx(10.0)


def test_it_goes_on_from_its_state() -> None:
    torch.manual_seed(1)
    grads = torch.randn(12, 3, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SharedScaleAdam([parameter], lr=0.1)
    for i, grad in enumerate(grads):
        if i == 5:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = SharedScaleAdam([parameter], lr=0.1)
            optimizer.load_state_dict(state)
        parameter.grad = grad.clone()
        optimizer.step()
    assert torch.equal(parameter.detach(), trajectory(grads, lr=0.1)[-1])


def test_no_closure() -> None:
    with pytest.raises(ValueError, match="closure"):
        SharedScaleAdam([torch.nn.Parameter(torch.ones(1))], lr=0.1).step(lambda: None)
