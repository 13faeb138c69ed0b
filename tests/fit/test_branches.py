"""Whole branches that vanish."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import (
    ChannelPruning,
    CompactionPlan,
    PlanError,
    compact,
    load_compact,
    mask_channels,
    max_relative_error,
    profile,
    prune_channels,
    save_compact,
    trace_channels,
)
from lightning_prune.branches import removable_branches
from lightning_prune.compaction.branches import Constant, NoChannels
from tests.fit.toys import ToyModule, loader, trainer


class Block(nn.Module):
    """conv-norm-relu, depthwise-norm-silu, conv-norm, added to the input: strides and paddings differ on purpose."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.dw = nn.Conv2d(hidden, hidden, 5, padding="same", groups=hidden)
        self.act = nn.PReLU(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.dw(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.block1 = Block(8, 12)
        self.block2 = Block(8, 10)
        self.mid = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.head(F.relu(self.mid(x)).mean((2, 3)))


def network() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # constants behind the branch that must not get lost
            nn.init.uniform_(module.bias, 0.5, 1.0)
            module.running_mean.uniform_(-1, 1)
    return net.eval(), torch.randn(4, 1, 6, 6)


def empty(net: nn.Module, x: Tensor, *names: str) -> CompactionPlan:
    graph = trace_channels(net, x)
    mask = np.ones(graph.num_channels, dtype=bool)
    for name in names:
        mask[graph[name].ids] = False
    return CompactionPlan.from_mask(graph, mask, remove_branches=True)


def test_only_branches_with_a_way_around_are_removable() -> None:
    net, x = network()
    graph = trace_channels(net, x)
    removable = removable_branches(net, x, graph)
    names = {g.name for g in graph.groups if removable[g.start]}
    assert names == {"block1.conv1", "block2.conv1"}


@pytest.mark.parametrize("names", [("block1.conv1",), ("block1.conv1", "block2.conv1")])
def test_an_emptied_branch_vanishes_and_its_constants_stay(names: tuple[str, ...], tmp_path: Path) -> None:
    net, x = network()
    plan = empty(net, x, *names)
    smaller = compact(net, x, plan)
    assert isinstance(smaller.block1.conv1, NoChannels)
    assert isinstance(smaller.block1.conv2, Constant)
    masked = mask_channels(net, x, plan)
    for size in (6, 9):
        other = torch.randn(2, 1, size, size)
        assert max_relative_error(masked, smaller, other) < 1e-5
    left = {n for n, p in smaller.block1.named_parameters() if p.numel()}
    assert left == {"conv2.bias", "bn2.weight", "bn2.bias"}
    layers = {layer.name: layer.macs for layer in profile(smaller, x).layers}
    assert sum(macs for name, macs in layers.items() if name.startswith("block1")) == 0
    save_compact(smaller, plan, tmp_path / "c.safetensors")
    again = load_compact(Net(), tmp_path / "c.safetensors")
    assert torch.equal(again(x), smaller(x))
    smaller.train()(x).sum().backward()  # it trains


def test_without_leave_no_group_is_emptied() -> None:
    net, x = network()
    graph = trace_channels(net, x)
    mask = np.ones(graph.num_channels, dtype=bool)
    mask[graph["block1.conv1"].ids] = False
    with pytest.raises(PlanError, match="all 12 channels of group 'block1.conv1' would be removed"):
        CompactionPlan.from_mask(graph, mask)
    kept = prune_channels(net, x, target=0.6, method="magnitude")
    assert kept.report.removed_branches == ()


def test_pruning_empties_a_useless_branch() -> None:
    net, x = network()
    with torch.no_grad():
        net.block1.conv1.weight.mul_(1e-6)
    # magnitudes are relative to a layer's mean, so rank by something absolute: keep block2 and mid
    result = prune_channels(
        net, x, target=0.5, exclude=["block2.*", "mid"], remove_branches=True, method="first_k"
    )
    assert result.report.macs_compact <= 0.5 * result.report.macs_dense
    assert "block1.conv1" in result.report.removed_branches
    assert "removed branches  block1.conv1" in str(result.report)


def test_a_fit_may_remove_branches() -> None:
    class Module(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

    torch.manual_seed(0)
    # one channel in each branch would still cost 15.7 %
    callback = ChannelPruning(target=0.12, warmup_epochs=1, learn_epochs=4, finetune_epochs=1, remove_branches=True,
                              include="net.block.*conv1", gate_lr=0.1)  # fmt: skip
    trainer([callback], 6).fit(Module(), loader())
    assert callback.report.removed_branches
    assert callback.report.macs_compact <= 0.12 * callback.report.macs_dense
