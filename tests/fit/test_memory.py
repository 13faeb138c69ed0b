"""What a step keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_prune.memory import saved_for_backward
from lightning_prune.meter import TrainingMeter
from tests.fit.reconfiguring import NETWORKS, fit, pruner


def seen_by_hooks(model: nn.Module, x: Tensor) -> int:
    """The same, as torch's own hooks on saved tensors see it."""
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    assert loss.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in mine)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_agrees_with_hooks_on_saved_tensors(network: str) -> None:
    model, x = NETWORKS[network](), torch.randn(5, 1, 6, 6)
    loss = model(x).square().sum()
    expected = seen_by_hooks(model, x)
    assert saved_for_backward(loss, model.parameters()) == expected > x.nbytes
    loss.backward()
    assert saved_for_backward(loss, model.parameters()) == 0, "freed"


class Double(torch.autograd.Function):
    """Saves its input and a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x * 2)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_custom_functions_and_checkpoints() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_for_backward(Double.apply(x).sum()) == 800
    assert saved_for_backward(Double.apply(x).sum(), [x]) == 400
    calls = []

    def layers(t: Tensor) -> Tensor:
        calls.append(1)
        return t.exp().exp().exp()

    loss = checkpoint(layers, x, use_reentrant=False).sum()
    assert saved_for_backward(loss, [x]) == 0
    assert len(calls) == 1, "nothing was computed again"
    loss.backward()


def test_in_a_fit_it_shrinks_with_the_network() -> None:
    callback = pruner(1, method="magnitude", learn_epochs=None, target=0.3)
    fit(callback, epochs=3)
    before, after, last = (record["activation_memory"] for record in callback.history)
    assert after == last < 0.8 * before
    report = callback.report
    assert (report.activation_memory, report.activation_memory_dense) == (after, before)
    assert "activation memory (kept for a step's backward pass)" in str(report)
    assert report.to_json()["activation_memory"] == after
    masked = pruner(0, method="magnitude", learn_epochs=None, target=0.3)
    fit(masked, epochs=2)
    assert masked.history[-1]["activation_memory"] == before, "masks save none"
    assert (masked.report.peak_memory, masked.report.peak_memory_dense) == (None, None), "only CUDA tells"


def test_the_peak_on_cuda_is_that_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    peak, device = [0], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda of: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda of: peak[0])
    meter, peaks = TrainingMeter(), []
    for epoch, used in enumerate((900, 700, 300)):
        meter.epoch(device)
        meter.start(4)
        peak[0] = max(peak[0], used)
        meter.end(1.0, 1.0, unpruned=epoch == 0)
        peaks.append(meter.record(device)["peak_memory"])
    assert peaks == [900, 700, 300]
    totals = meter.totals()
    assert (totals["peak_memory"], totals["peak_memory_dense"]) == (300, 900)
    again = TrainingMeter()
    again.load_state_dict(meter.state_dict())
    assert again.totals()["peak_memory_dense"] == 900
