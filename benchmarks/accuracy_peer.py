"""Torch-Pruning's GroupNormPruner in the same fit: its penalty while learning, its pruning to the budget, finetuning.

As in the recipe that its authors publish for CIFAR (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"):
group sparsity learning with reg 5e-4, group magnitude importance normalised by its maximum, global pruning in many small
steps until the budget is met. Optimizer, schedule, batches, number of epochs and warmup are those of all other methods.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import nn

from lightning_prune.experiments import Setting, Trial, TrialResult, run_trial
from lightning_prune.experiments.runner import Fit, seed_data, shared_warmup
from lightning_prune.profiling import profile
from lightning_prune.quiet import quiet

METHOD = "group_norm"
REG = 5e-4
STEPS = 400


class GroupNormPruning(L.Callback):
    """The peer's three phases at the epochs where ``ChannelPruning`` has its own."""

    def __init__(self, setting: Setting, target: float, example: torch.Tensor) -> None:
        self.warmup, self.learn, _ = setting.epochs
        self.target, self.example, self.metric = target, example, setting.metric
        self.pruner = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.warmup:
            self.start(pl_module.model)
        elif trainer.current_epoch == self.warmup + self.learn:
            self.prune(trainer, pl_module)

    def start(self, net: nn.Module) -> None:
        import torch_pruning as tp

        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        self.pruner = tp.pruner.GroupNormPruner(
            net,
            self.example,
            importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
            reg=REG,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[last],
        )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.pruner is not None:
            self.pruner.regularize(pl_module.model)

    def cost(self, net: nn.Module) -> float:
        return float(getattr(profile(net, self.example), self.metric))

    def prune(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net = pl_module.model
        limit = self.target * self.cost(net)
        for _ in range(STEPS):
            if self.cost(net) <= limit:
                break
            self.pruner.step()
        if self.cost(net) > limit:
            raise RuntimeError(
                f"Torch-Pruning stops at {self.cost(net):.0f}, above the budget of {limit:.0f}"
            )
        self.pruner = None
        optimizer = trainer.optimizers[0]  # the same one, so that the learning rate's schedule goes on
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = list(pl_module.parameters())


def run_with_peer(
    setting: Setting, trial: Trial, folder: Path, needed: TrialResult | None = None
) -> TrialResult:
    """``run_trial``, and the peer's method beside those of this package."""
    if trial.method != METHOD:
        return run_trial(setting, trial, folder, needed)
    with quiet():
        data = seed_data(setting.make_data, trial.seed)
        fit = Fit(setting, trial, data, shared_warmup(setting, trial, data, folder))
        module, dense = fit.module(), fit.module()
        seconds = fit.train(module, [GroupNormPruning(setting, trial.target, data.part("test").inputs[:1])])
        return fit.result(module, dense, setting.total_epochs, seconds)
