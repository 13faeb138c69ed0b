"""What a fit with pruning cannot work with, refused before the first step."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .config import PruneConfig
from .schedule import Schedule


def refuse_unsupported(trainer: pl.Trainer, module: pl.LightningModule, config: PruneConfig) -> None:
    """Raise MisconfigurationException for strategies and kinds of training that an option cannot work with."""
    unsupported = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    if isinstance(trainer.strategy, unsupported):
        raise MisconfigurationException(
            f"ChannelPruning does not work with {type(trainer.strategy).__name__}, which shards the weights that "
            "channels are made of. Use strategy='auto' or strategy='ddp'."
        )
    if config.metric == "latency" and trainer.world_size > 1:
        raise MisconfigurationException(
            f"metric='latency' measures one device, but the Trainer has {trainer.world_size} processes, whose "
            "measurements differ. Use devices=1, or metric='macs'."
        )
    if config.reconfigure_every_n_epochs:
        _refuse_copies(trainer)
        _refuse_captured(module)
    if config.distill and not module.automatic_optimization:
        raise MisconfigurationException(
            f"distill= adds to the loss that training_step returns, but {type(module).__name__} optimizes by hand "
            "(automatic_optimization=False). Use distill=0, and add lightning_prune.distillation.distillation_loss in "
            "training_step yourself."
        )


def _refuse_copies(trainer: pl.Trainer) -> None:
    """Whoever keeps weights of its own beside the module's cannot follow when these change their shapes."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"reconfigure_every_n_epochs= cannot exchange parameters under {type(trainer.strategy).__name__}. Use "
            "strategy='auto' on one device or strategy='ddp', or reconfigure_every_n_epochs=0."
        )
    averaging = (StochasticWeightAveraging, WeightAveraging)
    found = next((c for c in trainer.callbacks if isinstance(c, averaging)), None)  # type: ignore[attr-defined]
    if found is not None:
        raise MisconfigurationException(
            f"reconfigure_every_n_epochs= changes the shapes of the weights that {type(found).__name__} averages. Remove one "
            "of the two."
        )


def _refuse_captured(module: pl.LightningModule) -> None:
    """A captured CUDA graph goes on reading the memory that parameters had."""
    for name, inner in module.named_modules():
        forward = getattr(inner.__dict__.get("forward"), "__qualname__", "")
        if forward.startswith("make_graphed_callables."):
            raise MisconfigurationException(
                f"reconfigure_every_n_epochs= gives parameters other memory, but {name or 'the module'} replays a CUDA graph "
                "(torch.cuda.make_graphed_callables) that reads the old. Use torch.compile(mode='reduce-overhead'), which "
                "captures again, or reconfigure_every_n_epochs=0."
            )


def resolve_schedule(trainer: pl.Trainer, config: PruneConfig) -> Schedule:
    """Phases that fit into the trainer's epochs.

    With ``fast_dev_run`` one batch passes through everything: learn in epoch 0, select and compact at the end.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return Schedule(0, int(config.learns), None)
    try:
        return Schedule.resolve(config, trainer.max_epochs)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def refuse_late_rewind(trainer: pl.Trainer, config: PruneConfig, schedule: Schedule) -> None:
    """Raise MisconfigurationException for a ``rewind_to`` that no step before the selection reaches."""
    rewind, batches = config.rewind_to, trainer.num_training_batches * schedule.before_selection
    if rewind is not None and rewind * trainer.accumulate_grad_batches >= batches:
        raise MisconfigurationException(
            f"rewind_to={rewind} is not reached before channels are selected, after {schedule.before_selection} "
            f"epochs of {trainer.num_training_batches} batches: give an earlier step"
        )
