"""What several processes need to stay together."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor


def mean_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor]:
    """A function that averages a tensor over the processes of ``trainer``."""
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="mean")


def rewrap_ddp(trainer: pl.Trainer) -> None:
    """Wrap the module anew, once its parameters have other shapes: DDP's buckets are made for those of the start."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy.model is not strategy.lightning_module:
        assert strategy.lightning_module is not None
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
