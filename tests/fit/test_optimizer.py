"""An optimizer carried over to the compact network takes the steps the masked network would have taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PlanError, compact, mask_channels, prune_channels
from lightning_prune.compaction import apply_plan
from lightning_prune.compaction.optimizer import compact_optimizer
from tests.fit.toys import ToyNet, toy_data


def scheduled(model: nn.Module) -> torch.optim.Optimizer:
    """A scheduler puts another ``step`` into its optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    "adamw-groups": lambda m: torch.optim.AdamW(
        [{"params": [p for p in m.parameters() if p.dim() > 1], "weight_decay": 0.1},
         {"params": [p for p in m.parameters() if p.dim() == 1], "lr": 3e-3}], lr=1e-2),
    "sgd-momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, centered=True),
    "scheduled": scheduled,
    "sgd-plain": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
}  # fmt: skip


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    x, y = toy_data(48).tensors
    for _ in range(n):
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_training_goes_on_without_a_jump(name: str) -> None:
    torch.manual_seed(0)
    dense, x = ToyNet().double(), toy_data(4).tensors[0].double()
    optimizer = OPTIMIZERS[name](dense)
    steps(dense, optimizer, 3)
    plan = prune_channels(dense, x, target=0.5).plan
    masked = mask_channels(dense, x, plan)
    with torch.no_grad():  # the optimizer keeps stepping `dense`: make it the masked network
        for p, q in zip(dense.parameters(), masked.parameters(), strict=True):
            p.copy_(q)
    smaller = compact(dense, x, plan)
    carried = compact_optimizer(optimizer, dense, smaller, plan)
    assert type(carried) is type(optimizer)
    before = [group["lr"] for group in optimizer.param_groups]
    dense.train()
    smaller.train()
    for _ in range(3):
        steps(smaller, carried, 1)
        steps(dense, optimizer, 1)
        with torch.no_grad():  # dead channels are held at zero, as in a fit
            for p, q in zip(dense.parameters(), mask_channels(dense, x, plan).parameters(), strict=True):
                p.copy_(q)
    for p, q in zip(smaller.parameters(), apply_plan(dense, plan).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert [group["lr"] for group in carried.param_groups] == before
    torch.optim.lr_scheduler.StepLR(carried, 1, 0.5)  # schedulers accept it


def test_foreign_parameters() -> None:
    dense, x = ToyNet(), toy_data(4).tensors[0]
    plan = prune_channels(dense, x, target=0.5).plan
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3, 2))], lr=0.1)
    with pytest.raises(PlanError, match=r"parameter of shape \(3, 2\) that is not one of model's"):
        compact_optimizer(other, dense, apply_plan(dense, plan), plan)
