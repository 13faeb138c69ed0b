"""Parts of a network that are computed again in the backward pass, which have to save the same tensors then."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ChannelPruning, fused_norms, ops, skipping, trace_channels
from lightning_prune.conv_ways import Choice
from lightning_prune.skipping import DeadChannelSkipper
from tests.fit.toys import half_dead, trainer

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Net(nn.Module):
    """Which of its ``parts`` are checkpointed is chosen when it is made."""

    def __init__(self, parts: str) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
        layers += [nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
        self.parts, self.stem = parts, nn.Sequential(*layers)
        self.first, self.second, self.head = Block(12, 12), Block(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.parts != "blocks" or not self.training:
            return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))
        x = checkpoint_sequential(self.stem, 2, x, use_reentrant=False)
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


class Module(pl.LightningModule):
    """Keeps its losses, each the sum of those of a batch and of its mirror image."""

    def __init__(self, parts: str, memory_format: Any, twice: bool) -> None:
        super().__init__()
        self.net = Net(parts).double().to(memory_format=memory_format)
        self.format, self.twice = memory_format, twice
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.net.parts == "network" and self.training:
            result: Tensor = checkpoint(self.net, x, use_reentrant=False)
            return result
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.contiguous(memory_format=self.format)
        loss = F.cross_entropy(self(x), y)
        if self.twice:
            loss = loss + F.cross_entropy(self(x.flip(3)), y)
            with torch.no_grad():  # a network as it is in evaluation, before the backward pass
                self.net.eval()(x)
            self.net.train()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(parts: str, memory_format: Any, twice: bool, **options: Any) -> tuple[Module, ChannelPruning]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(32) % 4
    x = torch.randn(32, 3, 8, 8, generator=generator, dtype=torch.float64) + 0.5 * y[:, None, None, None]
    module = Module(parts, memory_format, twice)
    settings = {"target": 0.4, "warmup_epochs": 0, "learn_epochs": 4, "finetune_epochs": 1, "gate_lr": 0.05}
    settings["compact_on_fit_end"] = False
    callback = ChannelPruning(**(settings | options))
    trainer([callback], 5, precision="64-true").fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    return module, callback


@cache
def without_checkpoints(memory_format: Any, twice: bool, **options: Any) -> list[float]:
    return fit("", memory_format, twice, **options, dead_channel_skipping=False)[0].losses


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are chosen always, or by chance."""
    chance = np.random.default_rng(0) if request.param == "by chance" else None

    def conv(layer: Any, *unused: Any) -> Choice:
        best = skipping.SKIP if layer.share < 1 else skipping.FULL
        return Choice(*(best if chance is None else int(chance.choice([0, best, best])) for _ in range(3)))

    monkeypatch.setattr(skipping, "_measure", conv)
    monkeypatch.setattr(skipping, "LEAST_MACS", 0)
    monkeypatch.setattr(fused_norms, "_measure", lambda *a: chance is None or chance.random() < 0.7)
    monkeypatch.setattr(fused_norms, "LEAST_ELEMENTS", 0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("parts", "twice", "kernels"),
    [
        ("blocks", False, "always"),
        ("network", False, "always"),
        ("blocks", True, "always"),
        ("blocks", True, "by chance"),
    ],
    indirect=["kernels"],
)
def test_a_fit_is_that_without_checkpoints(
    parts: str, twice: bool, memory_format: Any, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step on, while channels die."""
    together: list[str] = []
    plain = fused_norms.together

    def counted(*args: Any) -> Tensor:
        together.append(args[2])
        return plain(*args)

    monkeypatch.setattr(fused_norms, "together", counted)
    every: list[dict[str, Any]] = [{"reconfigure_every_n_epochs": 0}, {"method": "taylor"}]
    for options in every:
        expected = without_checkpoints(memory_format, twice, **options)
        module, callback = fit(parts, memory_format, twice, **options)
        assert module.losses == pytest.approx(expected, rel=1e-7)
        assert callback.history[2]["live_channels"] < callback.history[0]["live_channels"]
    assert together


@pytest.mark.parametrize("kernels", ["always"], indirect=True)
def test_a_mask_that_is_set_during_a_step_is_taken_up_with_the_next(kernels: None) -> None:
    """Between the forward and the backward pass, as a second optimizer's step does."""
    torch.manual_seed(0)
    net = Net("blocks").double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    skipper = DeadChannelSkipper(net, trace_channels(net, x[:1]), x[:1])
    _, mask = half_dead(net, x[:1])
    skipper.set_mask(np.ones_like(mask))
    found = []
    for live in (mask, mask, np.ones_like(mask), mask):
        skipper.next_step()
        out = net(x)
        skipper.set_mask(live, now=False)
        (grad,) = torch.autograd.grad(out.square().sum(), net.first.conv1.weight)
        found.append((skipper._layers[0].share, grad * (net.first.conv1.weight != 0)))
    assert [share < 1 for share, _ in found] == [False, True, True, False]
    for _, grad in found:
        torch.testing.assert_close(grad, found[0][1], rtol=1e-9, atol=1e-9)
