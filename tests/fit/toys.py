"""A small network, module and data set for tests of the fit: seconds become milliseconds."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import trace_channels
from lightning_prune.channels.groups import ChannelGraph
from lightning_prune.weights import WeightKeeper


class ToyNet(nn.Module):
    """Conv-BN-ReLU, Conv-sigmoid, Flatten, Linear, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1, stride=2)
        self.fc1 = nn.Linear(16 * 9, 20)
        self.fc2 = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = torch.sigmoid(self.conv2(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class ToyModule(pl.LightningModule):
    """Cross-entropy with AdamW, a schedule and weight decay: what a user's own module looks like."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.net = ToyNet()
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 1e-2}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)]


def toy_data(n: int = 96, seed: int = 0) -> TensorDataset:
    """Three classes of 6x6 images: bright rows, bright columns, or neither, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = 0.3 * torch.randn(n, 1, 6, 6, generator=generator)
    x[labels == 0, :, 2] += 1
    x[labels == 1, :, :, 3] += 1
    return TensorDataset(x, labels)


def loader(n: int = 96, batch_size: int = 16) -> DataLoader[Any]:
    """In order, so that every run sees the same batches."""
    return DataLoader(toy_data(n), batch_size=batch_size)


def trainer(callbacks: list[pl.Callback], max_epochs: int, **options: Any) -> pl.Trainer:
    """A silent CPU trainer."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(max_epochs=max_epochs, callbacks=callbacks, **(defaults | options))


def toy_fit(callbacks: list[pl.Callback], max_epochs: int = 5, seed: int = 0, **options: Any) -> ToyModule:
    """Fit a fresh toy module."""
    torch.manual_seed(seed)
    module = ToyModule()
    trainer(callbacks, max_epochs, **options).fit(module, loader(), loader(24))
    return module


def half_dead(
    model: nn.Module, x: Tensor, seed: int = 1, share: float = 0.5
) -> tuple[ChannelGraph, np.ndarray]:
    """Zero the weights of a ``share`` of the channels, chosen at random; at least one of every group lives."""
    graph = trace_channels(model, x)
    mask = np.random.default_rng(seed).random(graph.num_channels) >= share
    for group in graph.groups:
        mask[group.start] = True
    keeper = WeightKeeper(model, graph)
    keeper.set_mask(mask)
    keeper.zero_dead()
    return graph, mask
