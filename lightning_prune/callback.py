"""The Lightning callback: learn which channels matter, remove the others, hand over a smaller network."""

from __future__ import annotations

import os
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from .batches import example_for, require_inputs
from .channels import ChannelGraph, trace_channels
from .channels.groups import Mask
from .compaction import CompactionPlan, compact, mask_channels, max_relative_error
from .config import PruneConfig, load_plan
from .cost import CostModel
from .criteria import saliency
from .errors import PlanError
from .inputs import ExampleInputs, to_model
from .learning import MaskLearner
from .monitor import Plateau
from .outcome import PruneReport
from .schedule import Phase, Schedule
from .scope import Patterns, protected_channels
from .selection import select_channels
from .weights import WeightKeeper


class ChannelPruning(pl.Callback):
    """Makes the network of a fit smaller: ``Trainer(callbacks=[ChannelPruning(target=0.5)])``.

    Phases, in whole epochs: *warmup* trains the dense network; *learn* trains one gate per channel under a penalty that is
    steered to the budget, and snaps gates that fall to zero; then the hard selection meets the budget, gates are folded
    into the weights, and *finetune* goes on with the removed channels held at zero. At the end of the fit
    ``compact_model`` is an ordinary smaller copy of the module, proven equal to the masked one.

    The user's module, optimizer and schedules are untouched: gates live here, with their own optimizer.

    Args:
        target: fraction of the dense cost to keep, in (0, 1]; met within 1 % from below where the widths allow.
        metric: ``"macs"`` or ``"params"``.
        method: ``"l1"`` learns gates; ``"magnitude"``, ``"random"`` and ``"first_k"`` rank the weights once after warmup.
        plan: a :class:`CompactionPlan` or its path instead of a method: its masks hold from the first step.
        warmup_epochs / learn_epochs: default to a fifth and two fifths of the trainer's ``max_epochs``.
        finetune_epochs: the fit stops after so many; default: all that remain, or until ``monitor`` is on a plateau.
        include / exclude: module names or regular expressions of layers to prune, or to keep whole.
        prune_streams: also prune residual streams (one gate per stream).
        round_to: live widths are multiples of this.
        min_channels: at least so many channels stay in every group.
        alternate_every_n_steps: push-pull: so many steps on the weights, then as many on the gates; 0 trains both at once.
        weight_l1 / weight_l2: penalties on the weights of pruned layers while learning, so that they do not grow to make
            up for shrinking gates (in addition to the user's weight decay, which never reaches the gates).
        sphere: hold every filter at the norm it had when learning began (He et al. 2017).
        gate_lr: Adam's rate for the gates; by default from the number of steps in the learn phase.
        snap_threshold: a gate whose magnitude falls to this is set to zero for good, its channel's weights too.
        monitor: validation metric whose plateau ends finetuning, for example ``"val_loss"``; None: never.
        patience: epochs without improvement that make a plateau.
        example_inputs: what ``forward`` takes; by default ``example_input_array`` or the first training samples.
        compact_on_fit_end: build ``compact_model`` when the fit ends.
        seed: for ``method="random"``.

    Attributes:
        compact_model: the smaller module after ``fit`` (in evaluation mode, on the module's device), else None.
        plan: the :class:`CompactionPlan`, once channels are selected.
        report: a :class:`PruneReport`, once channels are selected.
        history: one record per epoch: epoch, phase, macs, params, live_channels, lambda, gates.

    Raises:
        ValueError: an argument is out of range or misspelt.
        PlanError: ``plan`` is missing, corrupt or foreign.
    """

    def __init__(
        self,
        target: float = 0.5,
        metric: str = "macs",
        method: str = "l1",
        *,
        plan: CompactionPlan | str | os.PathLike[str] | None = None,
        warmup_epochs: int | None = None,
        learn_epochs: int | None = None,
        finetune_epochs: int | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        prune_streams: bool = False,
        round_to: int = 1,
        min_channels: int = 1,
        alternate_every_n_steps: int = 0,
        weight_l1: float = 0.0,
        weight_l2: float = 2.5e-4,
        sphere: bool = False,
        gate_lr: float | None = None,
        snap_threshold: float = 0.02,
        monitor: str | None = None,
        patience: int = 5,
        example_inputs: ExampleInputs | None = None,
        compact_on_fit_end: bool = True,
        seed: int = 0,
    ) -> None:
        self.config = PruneConfig(
            target, metric, method, load_plan(plan), warmup_epochs, learn_epochs, finetune_epochs, include, exclude,
            prune_streams, round_to, min_channels, alternate_every_n_steps, weight_l1, weight_l2, sphere, gate_lr,
            snap_threshold, monitor, patience, seed,
        )  # fmt: skip
        self.compact_on_fit_end = compact_on_fit_end
        self.compact_model: nn.Module | None = None
        self.plan: CompactionPlan | None = None
        self.report: PruneReport | None = None
        self.history: list[dict[str, Any]] = []
        self._given_inputs = example_inputs
        self._inputs: ExampleInputs | None = None
        self._graph: ChannelGraph | None = None
        self._learner: MaskLearner | None = None
        self._keeper: WeightKeeper | None = None
        self._plateau = Plateau(monitor, patience)
        self._resumed: dict[str, Any] = {}
        self._last_step = -1

    @property
    def state_key(self) -> str:
        """Distinguishes several instances in one checkpoint."""
        c = self.config
        return self._generate_state_key(target=c.target, metric=c.metric, method=c.method, include=c.include)

    # ---- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and trace the module if its data can be had already."""
        if stage != "fit":
            return
        unsupported = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
        if isinstance(trainer.strategy, unsupported):
            raise MisconfigurationException(
                f"ChannelPruning does not work with {type(trainer.strategy).__name__}, which shards the weights that channels "
                "are made of. Use strategy='auto' or strategy='ddp'."
            )
        try:
            self._schedule = self._fast_dev_run_schedule(trainer) or Schedule.resolve(
                self.config, trainer.max_epochs
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        inputs = example_for(trainer, pl_module, self._given_inputs)
        if inputs is not None:
            self._trace(pl_module, inputs)

    def _fast_dev_run_schedule(self, trainer: pl.Trainer) -> Schedule | None:
        """One smoke-test batch passes through everything: learn in epoch 0, select and compact at the end."""
        return Schedule(0, int(self.config.learned), None) if trainer.fast_dev_run else None  # type: ignore[attr-defined]

    def _trace(self, pl_module: pl.LightningModule, inputs: ExampleInputs) -> None:
        self._inputs = inputs
        graph = trace_channels(pl_module, inputs)
        config = self.config
        if config.plan is not None:
            config.plan.check_model(graph.tensors)
            config.plan.mask(graph)
        else:
            self._protected = protected_channels(graph, config.include, config.exclude, config.prune_streams)
            # an unreachable budget shows now, not after the learn phase
            ones = np.ones(graph.num_channels)
            select_channels(
                graph, ones, CostModel(graph, config.metric), config.target,  # type: ignore[arg-type]
                min_channels=config.min_channels, round_to=config.round_to, protected=self._protected,
            )  # fmt: skip
        self._graph = graph
        self._macs, self._params = CostModel(graph, "macs"), CostModel(graph, "params")
        self._cost = self._params if config.metric == "params" else self._macs

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Streaming data: trace with the first batch, before any step."""
        if self._graph is None:
            self._trace(pl_module, require_inputs(self._inputs, batch))
            self._begin(trainer, pl_module)
            self._enter(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the state of a checkpoint, or start with a given plan."""
        if self._graph is not None:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._graph is not None
        self._keeper = WeightKeeper(pl_module, self._graph)
        state, self._resumed = self._resumed, {}
        if state.get("plan") is not None:
            self._hold(CompactionPlan.from_json(state["plan"], "the checkpoint"))
        elif state.get("learner") is not None:
            self._start_learning(trainer, pl_module).load_state_dict(state["learner"])
            if self.config.sphere:
                self._keeper.remember_radii_as(state["radii"])
            self._keeper.set_mask(self._learner.mask())  # type: ignore[union-attr]
        elif self.config.plan is not None:
            self._hold(self.config.plan)

    # ---- phases ----------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase of this epoch."""
        if self._graph is not None:
            self._enter(trainer, pl_module)

    def _enter(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        phase = self._schedule.phase(trainer.current_epoch)
        if phase == Phase.LEARN and self._learner is None and self.plan is None:
            self._start_learning(trainer, pl_module)
        elif phase == Phase.FINETUNE and self.plan is None:
            self._select(pl_module)

    def _start_learning(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> MaskLearner:
        assert self._graph is not None
        assert self._keeper is not None
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        steps = trainer.estimated_stepping_batches
        if epochs is None or not np.isfinite(steps):
            per_epoch = trainer.num_training_batches / max(trainer.accumulate_grad_batches, 1)
            per_epoch = per_epoch if np.isfinite(per_epoch) else 1000.0
        else:
            per_epoch = steps / epochs
        total = max(1, round(per_epoch * self._schedule.learn))
        self._learner = MaskLearner(pl_module, self._graph, self._cost, self.config, self._protected, total)
        self._learner.hooks.attach()
        if self.config.sphere:
            self._keeper.remember_radii()
        return self._learner

    def _select(self, pl_module: pl.LightningModule) -> None:
        """The last word: a hard selection that meets the budget; gates are folded and gone."""
        assert self._graph is not None
        assert self._keeper is not None
        config, graph = self.config, self._graph
        eligible: Mask | None = None
        if self._learner is not None:
            values, eligible = self._learner.saliency(), self._learner.mask()
        else:
            values = saliency(config.method, pl_module, graph, config.seed)
        mask = select_channels(
            graph, values, self._cost, config.target, min_channels=config.min_channels, round_to=config.round_to,
            eligible=eligible, protected=self._protected,
        )  # fmt: skip
        if self._learner is not None:
            self._learner.hooks.detach()
            self._keeper.fold(self._learner.gates.multipliers())
        self._hold(CompactionPlan.from_mask(graph, mask))
        self._learner = None

    def _hold(self, plan: CompactionPlan) -> None:
        assert self._graph is not None
        assert self._keeper is not None
        self.plan = plan
        self.report = PruneReport.of(self._graph, plan)
        self._keeper.set_mask(plan.mask(self._graph))
        self._keeper.zero_dead()

    # ---- steps -----------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete and unscaled here, before clipping: the gates step first."""
        learner, keeper = self._learner, self._keeper
        if learner is None or keeper is None:
            return
        keeper.penalise(optimizer, self.config.weight_l1, self.config.weight_l2)
        if trainer.global_step != self._last_step:  # once per step, also with several optimizers
            self._last_step = trainer.global_step
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            learner.reduce_gradient(lambda grad: trainer.strategy.reduce(grad, reduce_op="mean"))
            if scaler is not None:
                learner.unscale(scaler.get_scale())
            freeze_weights = learner.alternating_on_gates()
            if learner.step():
                keeper.set_mask(learner.mask())
            self._freeze_weights = freeze_weights
        if self._freeze_weights:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    _freeze_weights = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the user's optimizer: dead stays dead, filters stay on their sphere."""
        if self._keeper is not None:
            if self._learner is not None and self.config.sphere:
                self._keeper.project_to_sphere()
            self._keeper.zero_dead()

    # ---- records ---------------------------------------------------------------------------------------------------

    def _mask(self) -> Mask:
        assert self._graph is not None
        if self.plan is not None:
            return self.plan.mask(self._graph)
        return (
            self._learner.mask()
            if self._learner is not None
            else np.ones(self._graph.num_channels, dtype=bool)
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and record; stop when finetuning is done."""
        if self._graph is None:
            return
        mask, phase = self._mask(), self._schedule.phase(trainer.current_epoch)
        record = {
            "macs": self._macs.cost(mask),
            "params": self._params.cost(mask),
            "live_channels": int(mask.sum()),
            "lambda": self._learner.strength if self._learner is not None else 0.0,
        }
        if self._learner is not None:
            gates = self._learner.gates_by_group()
        else:
            gates = {g.name: mask[g.ids].astype(float).tolist() for g in self._graph.groups}
        self.history.append(
            {"epoch": trainer.current_epoch, "phase": phase.name.lower(), **record, "gates": gates}
        )
        pl_module.log_dict(
            {"prune/phase": float(phase), **{f"prune/{k}": float(v) for k, v in record.items()}},
            sync_dist=True,
        )
        total = self._schedule.total
        stop = total is not None and trainer.current_epoch + 1 >= total
        if phase == Phase.FINETUNE:
            stop |= self._plateau.reached(trainer)
        if stop:
            trainer.should_stop = True

    # ---- end -------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select if learning was the last phase, then compact and prove it equal."""
        if self._graph is None or self._keeper is None:
            return
        last = self._schedule.phase(max(trainer.current_epoch - 1, 0))
        if self.plan is None:
            complete = trainer.current_epoch >= self._schedule.warmup + self._schedule.learn
            if not complete and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                warnings.warn(
                    f"the fit ended in the {last.name.lower()} phase, before channels were selected: there is no compact "
                    "model. Resume from a checkpoint, or shorten warmup_epochs and learn_epochs.",
                    stacklevel=2,
                )
                return
            self._select(pl_module)
        assert self.plan is not None
        assert self._inputs is not None
        if self.compact_on_fit_end:
            inputs = to_model(self._inputs, pl_module)
            self.compact_model = compact(pl_module, inputs, self.plan).eval()
            masked = mask_channels(pl_module, inputs, self.plan)
            error = max_relative_error(masked, self.compact_model, inputs)
            self.report = PruneReport.of(self._graph, self.plan, error)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """An aborted fit leaves no hook behind either (Lightning calls no teardown then)."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if self._learner is not None:
            self._learner.hooks.detach()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plan or gates, controller, history: a resumed fit goes on where this one is."""
        return {
            "plan": self.plan.to_json() if self.plan is not None else None,
            "learner": self._learner.state_dict() if self._learner is not None else None,
            "radii": self._keeper.radii() if self._keeper is not None else [],
            "history": self.history,
            "plateau": self._plateau.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: the module may still move to its device."""
        if not {"plan", "learner", "history", "plateau"} <= set(state_dict):
            raise PlanError(
                "the checkpoint holds no state of ChannelPruning; start a new fit from its weights instead"
            )
        self._resumed = dict(state_dict)
        self.history = list(state_dict["history"])
        self._plateau.load_state_dict(state_dict["plateau"])
