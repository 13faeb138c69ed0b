"""Gradients in memory that is used again: never while somebody holds one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ops, trace_channels
from lightning_prune.compaction import CompactionPlan, mask_channels
from lightning_prune.reused_memory import ReusedMemory
from lightning_prune.skipping import DeadChannelSkipper

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


ROWS, COLUMNS = torch.tensor([0, 2]), torch.tensor([1])


def spread(memory: ReusedMemory, value: float, like: Tensor) -> Tensor:
    """The gradient, all of whose live part is ``value``."""
    block = torch.full((2, 1, *like.shape[2:]), value, dtype=like.dtype)
    found = memory.spread(block, like, ROWS, COLUMNS)
    expected = torch.zeros_like(like)
    expected[ROWS[:, None], COLUMNS] = value
    assert torch.equal(found, expected)
    return found


def test_memory_is_given_out_again_when_nobody_holds_it() -> None:
    memory, like = ReusedMemory(), torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    first = spread(memory, 1.0, like)
    assert first.stride() == like.stride()
    assert first.dtype == like.dtype
    place = first.data_ptr()
    assert spread(memory, 2.0, like).data_ptr() != place
    assert float(first.max()) == 1.0
    view = first[0]
    del first
    assert spread(memory, 3.0, like).data_ptr() != place
    del view
    assert spread(memory, 4.0, like).data_ptr() == place
    assert spread(memory, 1.0, like.double()).dtype == torch.float64
    assert spread(memory, 1.0, torch.zeros(5, 3, 2, 2)).shape == (5, 3, 2, 2)


@pytest.mark.parametrize("write", ["add_", "foreach", "detached"])
def test_what_somebody_wrote_beside_the_live_part_is_gone(write: str) -> None:
    memory, like = ReusedMemory(), torch.zeros(4, 3, 2, 2)
    place = 0
    for value in (1.0, 2.0, 3.0):
        grad = spread(memory, value, like)
        place = place or grad.data_ptr()
        assert grad.data_ptr() == place
        if write == "add_":
            grad.add_(5)
        elif write == "foreach":
            torch._foreach_add_([grad], 5.0)
        else:
            grad.detach().view(-1).add_(5)
        del grad
    memory.spread(torch.ones(4, 1, 2, 2), like, None, COLUMNS)  # other lists: other zeros
    assert float(spread(memory, 1.0, like).sum()) == 8


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


@pytest.mark.parametrize("since", ["nothing", "added", "scaled", "others", "lists", "zeros", "copied"])
def test_a_gradient_knows_its_live_part(since: str) -> None:
    memory, like = ReusedMemory(), torch.zeros(4, 3, 2, 2)
    grad = memory.spread(torch.ones(2, 1, 2, 2), like, ROWS, COLUMNS)
    assert ReusedMemory.live_part(grad, ROWS, COLUMNS) is None  # from the second call on
    del grad
    block = torch.zeros(2, 1, 2, 2) if since == "zeros" else torch.randn(2, 1, 2, 2)
    grad = memory.spread(block, like, ROWS, COLUMNS)
    rows = ROWS.clone()
    if since == "added":
        grad.add_(1)
    elif since == "scaled":  # without a new version
        version = grad._version
        torch._amp_foreach_non_finite_check_and_unscale_([grad], torch.zeros(1), torch.tensor(0.5))
        assert grad._version == version
    elif since == "others":
        grad = memory.spread(block, like, ROWS, COLUMNS)
    elif since == "lists":
        rows = torch.tensor([0, 3])
    elif since == "copied":
        grad = grad.clone()
    found = ReusedMemory.live_part(grad, rows, COLUMNS)
    if since == "nothing":
        assert found is block
        assert ReusedMemory.live_part(grad, rows, COLUMNS) is None  # once: whoever has it may change it
    else:
        assert found is None
