"""Dead weights are exactly zero after every step, whatever the optimizer has made of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import CompactionPlan, mask_channels, trace_channels, weights
from lightning_prune.weights import WeightKeeper


class Net(nn.Module):
    """A convolution between norms and a residual sum, a depthwise one, a dense layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.depth, self.back = nn.Conv2d(7, 7, 3, padding=1, groups=7), nn.Conv2d(7, 7, 3, padding=1)
        self.head = nn.Linear(7 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.back(torch.relu(self.depth(x)))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_is_dead_is_zero_and_nothing_else(
    dtype: torch.dtype, memory_format: torch.memory_format, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 4, 4)
    model = Net()
    graph = trace_channels(model, x)
    model = model.to(dtype).to(memory_format=memory_format)
    mask = np.random.default_rng(0).random(graph.num_channels) < 0.5
    for group in graph.groups:
        mask[group.start] = True
    expected = mask_channels(model, None, CompactionPlan.from_mask(graph, mask)).state_dict()
    before = copy.deepcopy(model.state_dict())
    keeper = WeightKeeper(model, graph)
    keeper.set_mask(mask)
    if not compiled:
        monkeypatch.setattr(weights, "extension_available", lambda: False)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            dead = (expected[name] == 0) & (before[name] != 0)
            if tensor.is_floating_point():
                tensor[dead] = (
                    float("nan") if "bias" in name else float("inf")
                )  # no multiplication removes these
    before_call = [tensor._version for tensor, _ in keeper._dead]
    keeper.zero_dead()
    # Whoever saved a tensor for a backward pass sees that it has changed.
    assert all(tensor._version > old for (tensor, _), old in zip(keeper._dead, before_call, strict=True))
    assert sum(int((e == 0).sum()) for e in expected.values()) > 50
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert not torch.signbit(tensor[expected[name] == 0]).any()
