"""The Lightning callback: learn which channels matter, remove the others, hand over a smaller network."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from .batches import RecentBatches, example_for, require_inputs
from .compaction import CompactionPlan
from .config import PruneConfig, load_plan
from .distributed import mean_over_ranks, rewrap_ddp
from .errors import PlanError
from .fit import PruningFit
from .guards import (
    gradients_meet,
    refuse_late_rewind,
    refuse_nothing_learned,
    refuse_unsupported,
    resolve_schedule,
    why_full_size,
)
from .inputs import ExampleInputs, batch_size
from .meter import TrainingMeter
from .monitor import Plateau
from .outcome import FirstFilters, PruneReport
from .progress import measuring_bar
from .recalibration import wanted_batches
from .schedule import Phase, Schedule
from .scope import Patterns

#: training batches kept for least squares
_RECENT_BATCHES = 8


class ChannelPruning(pl.Callback):
    """Makes the network of a fit smaller: ``Trainer(callbacks=[ChannelPruning(target=0.5)])``.

    Phases, in whole epochs: *warmup* trains the dense network; *learn* trains one gate per channel under a penalty that is
    steered to the budget, and snaps gates that fall to zero; then the hard selection meets the budget, gates are folded
    into the weights, and *finetune* goes on with the removed channels held at zero. At the end of the fit
    ``compact_model`` is an ordinary smaller copy of the module, proven equal to the masked one.

    The user's module, optimizer and schedules are untouched: gates live here, with their own optimizer.

    Args:
        target: fraction of the dense cost to keep, in (0, 1]; met within 1 % from below where the widths allow.
        metric: ``"macs"``, ``"params"`` or ``"latency"``, measured on the training device for the batch of
            ``example_inputs`` (one process only).
        method: ``"l1"`` learns gates; ``"magnitude"``, ``"random"`` and ``"first_k"`` rank the weights once after warmup, or,
            with ``learn_epochs``, again and again while the budget tightens along ``ramp``, as ``"taylor"`` does.
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
        gate_lr: learning rate of the gates; by default from the number of steps in the learn phase.
        snap_threshold: a gate whose magnitude falls to this is set to zero for good, its channel's weights too.
        method_options: further arguments of the method, see its class in ``lightning_prune.gates``.
        ratios: ``{module name or regular expression: share of channels to keep}`` for single layers; the budget governs
            the others.
        reconstruct: when channels are removed, refit their readers by least squares on the last training batches.
        rewind_to: optimizer step whose weights the fit returns to when channels are selected (lottery tickets); the
            optimizer's state starts afresh, schedules go on.
        remove_branches: whole residual branches may go when all their channels do; their layers vanish, the shortcut stays.
        reentry_until: share of the learn phase until which masked channels may come back (their weights are kept and go on
            learning); afterwards masks only shrink. 0: what is gone is gone.
        penalty_weights: ``{module name or regular expression: factor}``: how much harder than others a layer's or branch's
            channels are pressed; where nothing is pressed their saliency is divided by it.
        distill: weight of a loss that pulls the logits while finetuning towards those of the dense network, as it was when
            learning began (at one-shot: when channels were selected; with a plan: at the start). 0: none.
        distill_temperature: of both softmaxes in that loss (Hinton et al. 2015).
        recalibrate: re-estimate batch norm statistics on so many recent training batches (True: 8) when channels are
            selected and at the end of the fit.
        ramp: how the budget tightens while learning: ``"cubic"``, ``"exponential"`` or ``"linear"``.
        monitor: validation metric whose plateau ends finetuning, for example ``"val_loss"``; None: never.
        patience: epochs without improvement that make a plateau.
        example_inputs: what ``forward`` takes; by default ``example_input_array`` or the first training samples.
        compact_on_fit_end: build ``compact_model`` when the fit ends.
        dead_channel_skipping: convolutions take the compiled kernels while the network trains, without their dead
            channels and by Winograd, where that is measured to be faster (see
            :class:`lightning_prune.skipping.DeadChannelSkipper`), and torch's elementwise optimizers leave dead weights out
            (:class:`lightning_prune.live_steps.LiveSteps`); the same numbers up to rounding. Nothing dead is left out where
            dead weights have gradients and these count for other weights (:mod:`lightning_prune.dead_gradients`).
        reconfigure_every_n_epochs: cut dead channels out of the module itself, and of its optimizers' states, at the end of
            every so many epochs and when channels are selected: steps get as fast, and need as little memory, as those of the
            small network. Checkpoints stay full-size, and so is the module again when the fit is over. ``"auto"``: when
            channels are selected, and at the end of epochs in which much has died, unless somebody else could notice
            (``guards.why_full_size``). 0: never.
        seed: for ``method="random"``.

    Attributes:
        compact_model: the smaller module after ``fit`` (in evaluation mode, on the module's device), else None.
        plan: the :class:`CompactionPlan`, once channels are selected.
        report: a :class:`PruneReport`, once channels are selected.
        first_filters: see :func:`lightning_prune.plots.plot_filters`.
        history: one record per epoch of the fit (a trainer that trains its module again goes on with it, any other fit starts
            anew): epoch, phase, macs, params, live_channels, lambda, gates, step_time, samples_per_second,
            saved_training_macs, activation_memory, on CUDA peak_memory (all logged as ``prune/...``).

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
        method_options: dict[str, Any] | None = None,
        ratios: dict[str, float] | None = None,
        reconstruct: bool = False,
        rewind_to: int | None = None,
        remove_branches: bool = False,
        ramp: str = "cubic",
        reentry_until: float = 0.0,
        penalty_weights: dict[str, float] | None = None,
        distill: float = 0.0,
        distill_temperature: float = 4.0,
        recalibrate: bool | int = False,
        monitor: str | None = None,
        patience: int = 5,
        example_inputs: ExampleInputs | None = None,
        compact_on_fit_end: bool = True,
        dead_channel_skipping: bool = True,
        reconfigure_every_n_epochs: int | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        given = locals()
        options = {field.name: given[field.name] for field in fields(PruneConfig)}
        self.config = PruneConfig(
            **options | {"plan": load_plan(plan), "method_options": method_options or {}}
        )
        self.compact_on_fit_end = compact_on_fit_end
        self._given_inputs, self._stage = example_inputs, "fit"
        self._watched = monitor, patience
        self._schedule: Schedule | None = None
        self._kept_batches = max(wanted_batches(recalibrate), _RECENT_BATCHES * reconstruct)
        self._start_anew()

    def _start_anew(self, module: pl.LightningModule | None = None) -> None:
        """Nothing is left of the last fit."""
        self.compact_model: nn.Module | None = None
        self.report: PruneReport | None = None
        self.history: list[dict[str, Any]] = []
        self._module, self._last_step, self._begun_step = module, -1, -1
        self._fit: PruningFit | None = None
        self._resumed: dict[str, Any] = {}
        self._plateau = Plateau(*self._watched)
        self._recent = RecentBatches(self._kept_batches)
        self._meter = TrainingMeter()

    @property
    def plan(self) -> CompactionPlan | None:
        """What is removed, once channels are selected."""
        return self._fit.plan if self._fit is not None else None

    @property
    def first_filters(self) -> FirstFilters | None:
        """Filters of the first convolution when the fit began and now, once it has begun."""
        return self._fit.first_filters() if self._fit is not None else None

    @property
    def state_key(self) -> str:
        """Distinguishes several instances in one checkpoint."""
        c = self.config
        return self._generate_state_key(target=c.target, metric=c.metric, method=c.method, include=c.include)

    # ---- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, trace the module if its data can be had; a trainer's own module goes on with its fit."""
        self._stage = stage
        if stage != "fit":
            return
        refuse_unsupported(trainer, pl_module, self.config)
        self._schedule = resolve_schedule(trainer, self.config)
        if self._fit is not None and self._module is pl_module and trainer.current_epoch > 0:
            self._resumed = self._fit.state_dict()
            self._plateau.waited = 0
            return
        self._start_anew(pl_module)
        inputs = example_for(trainer, pl_module, self._given_inputs)
        self._fit = PruningFit(self.config, pl_module, inputs) if inputs is not None else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the state of a checkpoint, or start with a given plan."""
        if self._fit is not None:
            self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Streaming data: trace with the first batch, before any step. Keep what selection will need."""
        if self._fit is None:
            self._fit = PruningFit(self.config, pl_module, require_inputs(self._given_inputs, batch))
            self._begin(trainer, pl_module)
            self._enter(trainer, pl_module)
        if self._fit.skipper is not None and trainer.global_step != self._begun_step:
            self._fit.skipper.next_step()
        self._begun_step = trainer.global_step
        if self._fit.plan is None and trainer.global_step == self.config.rewind_to:
            self._fit.remember(pl_module)
        if self.config.recalibrate or (self._fit.plan is None and self.config.reconstruct):
            self._recent.add(batch)
        self._meter.start(batch_size(batch))

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._fit is not None
        assert self._schedule is not None
        refuse_late_rewind(trainer, self.config, self._schedule)
        with measuring_bar(trainer) as progress:
            self._fit.begin(
                pl_module,
                self._resumed,
                self._schedule.learn_steps(trainer),
                progress,
                optimizers=lambda: trainer.optimizers,
                rewrap=lambda: rewrap_ddp(trainer),
                full_size=why_full_size(trainer, pl_module, self._fit.graph.prunable),
                gradients_meet=gradients_meet(trainer, pl_module),
            )
        self._resumed = {}

    # ---- phases and steps ------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase of this epoch."""
        self._meter.epoch(pl_module.device)
        if self._fit is not None:
            self._fit.counted = False
            self._enter(trainer, pl_module)

    def _enter(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._fit is not None
        assert self._schedule is not None
        phase = self._schedule.phase(trainer.current_epoch, self.plan is not None)
        if self._fit.plan is None and phase == Phase.LEARN and self._fit.learner is None:
            self._fit.start_learning(pl_module, self._schedule.learn_steps(trainer))
        elif self._fit.plan is None and phase == Phase.FINETUNE:
            if self._fit.learner is None:
                refuse_nothing_learned(trainer, self.config)
            self._select(trainer, pl_module)

    def _select(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._fit is not None
        rewound = self._fit.early is not None
        self._fit.select(pl_module, self._recent.take(trainer), mean_over_ranks(trainer))
        if self.config.reconstruct and trainer.world_size > 1:  # ranks saw different batches
            for parameter in pl_module.parameters():
                parameter.data.copy_(trainer.strategy.broadcast(parameter.data))
        if rewound:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        """The step's graph is complete: what it keeps is what training needs memory for."""
        if self._fit is not None:
            self._fit.count_work(pl_module)
            self._meter.backward(loss, pl_module.parameters(), self._fit.nothing_dead)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete and unscaled here, before clipping: the gates step first."""
        if self._fit is None or self._fit.learner is None:
            return
        first = trainer.global_step != self._last_step  # once per step, also with several optimizers
        self._last_step = trainer.global_step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._fit.before_step(
            optimizer,
            gates_too=first,
            reduce=mean_over_ranks(trainer),
            loss_scale=scaler.get_scale() if scaler is not None else 1.0,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the user's optimizer: dead stays dead, filters stay on their sphere."""
        if self._fit is not None:
            self._fit.after_step()
            unpruned = self._fit.nothing_dead and self._fit.learner is None
            self._meter.end(self._fit.step_macs, self._fit.macs.dense, unpruned)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is no training time."""
        self._meter.pause()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and record; stop when finetuning is done."""
        if self._fit is None:
            return
        assert self._schedule is not None
        phase = self._schedule.phase(trainer.current_epoch, self.plan is not None)
        record = self._fit.record() | self._meter.record(pl_module.device)
        head = {"epoch": trainer.current_epoch, "phase": phase.name.lower()}
        self.history.append({**head, **record, "gates": self._fit.gates()})
        logged = {"prune/phase": float(phase)} | {f"prune/{name}": float(v) for name, v in record.items()}
        pl_module.log_dict(logged, sync_dist=True)
        self._report(self._fit.report())
        total = self._schedule.total
        stop = total is not None and trainer.current_epoch + 1 >= total
        if phase == Phase.FINETUNE:
            stop |= self._plateau.reached(trainer)
        if stop:
            trainer.should_stop = True
        every = self.config.cut_every or int(self.config.cuts_unasked)
        if every and (trainer.current_epoch + 1) % every == 0 and not stop:
            self._fit.reconfigure(pl_module)

    # ---- end -------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select if learning was the last phase, then compact and prove it equal."""
        if self._fit is None or self._schedule is None:
            return
        if self._fit.plan is None:
            complete = trainer.current_epoch >= self._schedule.before_selection
            if not complete and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                phase = self._schedule.phase(max(trainer.current_epoch - 1, 0)).name.lower()
                warnings.warn(
                    f"the fit ended in the {phase} phase, before channels were selected: there is no compact model. "
                    "Resume from a checkpoint, or shorten warmup_epochs and learn_epochs.",
                    stacklevel=2,
                )
                return
            self._select(trainer, pl_module)
        elif self._recent:
            self._fit.recalibrate(pl_module, self._recent.take(trainer), mean_over_ranks(trainer))
        if self.compact_on_fit_end:
            self.compact_model, report = self._fit.compact(pl_module)
            self._report(report)

    def _report(self, report: PruneReport | None) -> None:
        self.report = replace(report, **self._meter.totals()) if report else None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """An aborted fit leaves no hook behind either (Lightning calls no teardown then)."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if self._fit is not None:
            self._fit.release()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plan or gates, controller, history: a resumed fit goes on where this one is."""
        fit = self._fit.state_dict() if self._fit is not None else {}
        own = {"history": self.history, "plateau": self._plateau.state_dict()}
        return {"fit": fit, **own, "meter": self._meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts (the module may still move); evaluating a checkpoint leaves a fit as it is."""
        if not {"fit", "history", "plateau"} <= set(state_dict):
            raise PlanError(
                "the checkpoint holds no state of ChannelPruning; start a new fit from its weights instead"
            )
        if self._stage != "fit" and self._fit is not None:
            return
        self._resumed = dict(state_dict["fit"])
        self.history = list(state_dict["history"])
        self._plateau.load_state_dict(state_dict["plateau"])
        if "meter" in state_dict:
            self._meter.load_state_dict(state_dict["meter"])
