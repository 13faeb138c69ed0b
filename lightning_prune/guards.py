"""What a fit with pruning cannot work with, refused before the first step."""

from __future__ import annotations

from collections.abc import Container

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    LambdaCallback,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from .config import PruneConfig
from .live_steps import steps_elementwise
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
    if config.cut_every:
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


#: where code that acts on weights or gradients between steps is written
_BETWEEN_STEPS = (
    "on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward", "on_before_zero_grad",
    "on_before_optimizer_step", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping",
)  # fmt: skip


def why_full_size(trainer: pl.Trainer, module: pl.LightningModule, traced: Container[str]) -> str | None:
    """What could notice that dead channels are cut out when channels are selected; None: nothing.

    Cut by default, the network has to train as the masked one would: nobody else may keep or change weights or gradients
    (code of the user's between steps, callbacks of other origins, copies of the network, averages, clipping by a norm that
    dead channels' readers share), chance may not depend on the number of channels, and each step goes element by element.

    Args:
        trainer: of the fit that begins; its optimizers are there.
        module: full-size.
        traced: names of the tensors that have channels.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        return f"the strategy is {type(trainer.strategy).__name__}"
    if not module.automatic_optimization:
        return f"{type(module).__name__} optimizes by hand"
    # A captured CUDA graph, for one, goes on reading the memory that parameters had.
    exchanged = next((name for name, inner in module.named_modules() if "forward" in inner.__dict__), None)
    if exchanged is not None:
        return f"{exchanged or 'the module'} has another forward than its class"
    hook = next((name for name in _BETWEEN_STEPS if is_overridden(name, module)), None)
    if hook is not None:
        return f"{type(module).__name__} has its own {hook}"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in module.parameters()):
        return "a parameter has hooks"
    if trainer.gradient_clip_val:
        return "gradients are clipped"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        home = type(callback).__module__.split(".")[0]
        unknown = home not in ("lightning", "pytorch_lightning", "lightning_prune")
        if unknown or isinstance(
            callback, (StochasticWeightAveraging, WeightAveraging, LambdaCallback, ModelPruning)
        ):
            return f"{type(callback).__name__} may keep or change weights"
    for optimizer in trainer.optimizers:
        if not steps_elementwise(optimizer):
            return f"{type(optimizer).__name__} is not known to step each weight by itself"
    dropouts = (nn.modules.dropout._DropoutNd, nn.RReLU)
    if any(isinstance(m, dropouts) for m in module.modules()):
        return "dropout would draw other numbers"
    shapes = {
        name: (_has_channels(name, child, traced), [tuple(p.shape) for p in child.parameters()])
        for name, child in module.named_children()
    }
    for name, (of_network, sizes) in shapes.items():
        if not of_network and sizes and any(other and sizes == theirs for other, theirs in shapes.values()):
            return f"{name} looks like a copy of the network"
    return None


#: where code that may look at all gradients together is written
_ON_GRADIENTS = (
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "configure_gradient_clipping",
)


def gradients_meet(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether a weight's step may depend on the gradients of others: by clipping, in user code, in optimizers such as LBFGS."""
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        return True
    own_code = any(is_overridden(name, module) for name in _ON_GRADIENTS)
    by_hand = own_code or not module.automatic_optimization
    return by_hand or not all(map(steps_elementwise, trainer.optimizers))


def _has_channels(name: str, child: nn.Module, traced: Container[str]) -> bool:
    """Whether any parameter of a child has channels."""
    return any(f"{name}.{own}" in traced for own, _ in child.named_parameters())


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


def refuse_nothing_learned(trainer: pl.Trainer, config: PruneConfig) -> None:
    """Raise MisconfigurationException for a fit that begins after the epochs in which a method learns its masks."""
    if config.learned:
        raise MisconfigurationException(
            f"the fit begins at epoch {trainer.current_epoch}, after the epochs in which method={config.method!r} learns what "
            "to remove: the trainer has trained another module, or the checkpoint was written without this callback. Use a "
            "new Trainer, or warmup_epochs and learn_epochs that reach further."
        )
