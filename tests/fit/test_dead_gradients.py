"""Weights of dead channels that have gradients, and whoever looks at all gradients together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ChannelPruning, skipping, trace_channels
from lightning_prune.dead_gradients import dead_weights_have_gradients
from lightning_prune.guards import gradients_meet
from lightning_prune.ops.availability import extension_available
from tests.fit.toys import ToyModule, loader, trainer


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.norm = nn.GroupNorm(1, 12) if norm else nn.BatchNorm2d(12)
        self.head, self.act = nn.Linear(8, 3), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv2(self.act(self.norm(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("act", "norm", "expected"),
    [(F.relu, False, False), (F.gelu, False, False), (torch.sigmoid, False, True), (F.relu, True, True)],
)
def test_are_found_by_trying(act: Callable[[Tensor], Tensor], norm: bool, expected: bool) -> None:
    torch.manual_seed(0)
    net, x = Net(act, norm).train(), torch.randn(4, 1, 6, 6)
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    assert dead_weights_have_gradients(net, trace_channels(net, x), x) == expected
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())


class Sigmoid(ToyModule):
    """In double precision, with any optimizer."""

    def __init__(self, act: Callable[[Tensor], Tensor], lbfgs: bool = False) -> None:
        super().__init__()
        self.net, self.lbfgs = Net(act), lbfgs
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        if self.lbfgs:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
@pytest.mark.parametrize("act", [torch.sigmoid, F.relu])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.01}, {"lbfgs": True}])
def test_skipping_trains_as_masks_do(
    act: Callable[[Tensor], Tensor], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        skipping,
        "_measure",
        lambda layer, *rest: skipping.Choice(*3 * (skipping.SKIP if layer.share < 1 else skipping.FULL,)),
    )
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    losses, callbacks = [], []
    for skips in (False, True):
        torch.manual_seed(0)
        module = Sigmoid(act, options.get("lbfgs", False))
        callback = ChannelPruning(
            target=0.4,
            method="magnitude",
            warmup_epochs=1,
            dead_channel_skipping=skips,
            reconfigure_every_n_epochs=0,
        )
        clip = {k: v for k, v in options.items() if k != "lbfgs"}
        trainer([callback], 4, precision="64-true", **clip).fit(module, loader(), loader(24))
        losses.append(module.losses)
        callbacks.append(callback)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert callbacks[0].plan == callbacks[1].plan
    shares = [layer.share for layer in callbacks[1]._fit.skipper._layers]
    harmless = not options or (act is F.relu and "lbfgs" not in options)
    assert (min(shares) < 1) == harmless


def test_who_looks_at_all_gradients_together() -> None:
    class Logs(ToyModule):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            pass

    def asked(module: pl.LightningModule, **options: Any) -> bool:
        return gradients_meet(trainer([], 1, **options), module)

    assert not asked(ToyModule())
    assert asked(Logs())
    assert asked(ToyModule(), gradient_clip_val=1.0)
    assert not asked(ToyModule(), gradient_clip_val=1.0, gradient_clip_algorithm="value")
    byhand = ToyModule()
    byhand.automatic_optimization = False
    assert asked(byhand)
