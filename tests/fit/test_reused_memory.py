"""Gradients in memory that is used again: never while somebody holds one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ops, trace_channels
from lightning_prune.compaction import CompactionPlan, mask_channels
from lightning_prune.conv_ways import ReusedMemory
from lightning_prune.skipping import DeadChannelSkipper

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


def test_memory_is_given_out_again_when_nobody_holds_it() -> None:
    memory, like = ReusedMemory(), torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    first = memory.take(like)
    assert first.stride() == like.stride()
    assert first.dtype == like.dtype
    place = first.data_ptr()
    assert memory.take(like).data_ptr() != place
    view = first[0]
    del first
    assert memory.take(like).data_ptr() != place
    del view
    assert memory.take(like).data_ptr() == place
    assert memory.take(like.double()).dtype == torch.float64
    assert memory.take(torch.zeros(5, 3, 2, 2)).shape == (5, 3, 2, 2)


@pytest.mark.parametrize("keep", ["nothing", "gradients", "accumulate"])
def test_gradients_of_earlier_steps_stay(keep: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 80, 3, padding=1), nn.BatchNorm2d(80), nn.ReLU(), nn.Conv2d(80, 80, 3), nn.Flatten(1),
        nn.Linear(80 * 14 * 14, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    graph = trace_channels(model, x[:1])
    mask = torch.arange(graph.num_channels).remainder(2).eq(0).numpy()
    model = mask_channels(model, x[:1], CompactionPlan.from_mask(graph, mask)).train()
    twin = copy.deepcopy(model)
    skipper = DeadChannelSkipper(model, graph, x[:1])
    skipper.set_mask(mask)
    assert skipper.obstacle is None
    found: list[list[Tensor]] = [[], []]
    places = set()
    for _ in range(4):
        for net, seen in zip((model, twin), found, strict=True):
            if keep != "accumulate":
                net.zero_grad()
            F.cross_entropy(net(x), torch.arange(4)).backward()
            grad = net[3].weight.grad
            assert grad is not None
            seen.append(grad if keep == "gradients" else grad.clone())
            places.add(grad.data_ptr() if net is model else 0)
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                a.add_(0.01)
                b.add_(0.01)
            for net in (model, twin):
                net.load_state_dict(
                    mask_channels(net, x[:1], CompactionPlan.from_mask(graph, mask)).state_dict()
                )
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert len(places) == {"nothing": 2, "gradients": 5, "accumulate": 2}[keep]
