"""Networks, modules and fits for tests of a network that is cut while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import ChannelPruning
from tests.fit.toys import loader, trainer


class Plain(nn.Module):
    """Convolutions, one with a bias behind a norm and one before a sigmoid, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(16 * 9, 20)
        self.fc2 = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.sigmoid(self.bn2(self.conv2(x))).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class Residual(nn.Module):
    """Two residual blocks over one stream, and a head that pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 10, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(10, 14, 3, padding=1, bias=False),
                nn.BatchNorm2d(14),
                nn.ReLU(),
                nn.Conv2d(14, 10, 3, padding=1, bias=False),
                nn.BatchNorm2d(10),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between two that mix channels, group norm, and a reshape with the sizes written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 16, 1)
        self.group_norm = nn.GroupNorm(1, 16)
        self.head = nn.Linear(16 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depthwise(self.first(x))))
        x = F.relu(self.group_norm(self.point(x)))
        return self.head(x.reshape(-1, 16 * 36))


NETWORKS: dict[str, type[nn.Module]] = {"plain": Plain, "residual": Residual, "depthwise": Depthwise}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda groups: torch.optim.AdamW(groups, lr=3e-3),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
}


class Module(pl.LightningModule):
    """Two parameter groups and a scheduler."""

    def __init__(self, network: str = "plain", optimizer: str = "adam", channels_last: bool = False) -> None:
        super().__init__()
        self.net = NETWORKS[network]()
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        self._optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 1e-2}, {"params": rest, "weight_decay": 0.0}]
        optimizer = OPTIMIZERS[self._optimizer](groups)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)]


class Watch(pl.Callback):
    """The full-size state after every step, the sizes at work, and learning rates."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.sizes: list[int] = []
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        self.states.append({k: v.detach().clone() for k, v in pl_module.state_dict().items()})
        self.sizes.append(sum(p.numel() for p in pl_module.parameters()))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def pruner(every: int, **options: Any) -> ChannelPruning:
    defaults: dict[str, Any] = {
        "target": 0.4, "warmup_epochs": 1, "learn_epochs": 3, "gate_lr": 0.05, "prune_streams": True,
        "dead_channel_skipping": False, "reconfigure_every_n_epochs": every,
    }  # fmt: skip
    return ChannelPruning(**(defaults | options))


def fit(
    callback: ChannelPruning, module: Module | None = None, epochs: int = 6, seed: int = 0, **options: Any
) -> tuple[Module, Watch]:
    """Fit in double precision (unless told otherwise), so that only order of summation differs."""
    torch.manual_seed(seed)
    module = module if module is not None else Module()
    watch = Watch()
    callbacks = [callback, watch, *options.pop("callbacks", [])]
    paths = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
    trainer(callbacks, epochs, **({"precision": "64-true"} | options)).fit(
        module, loader(), loader(24), **paths
    )
    return module, watch
