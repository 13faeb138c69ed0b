"""One fit with pruning, independent of the trainer: what the callback's hooks do when they are called."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .branches import removable_branches
from .channels import trace_channels
from .channels.groups import ChannelGraph, Mask
from .choosing import MaskChooser
from .compaction import CompactionPlan, compact, mask_channels, max_relative_error
from .config import PruneConfig
from .cost import Cost, CostModel
from .criteria import saliency
from .dead_gradients import dead_weights_matter
from .distillation import Distiller, logit_calls
from .errors import CompactionError
from .first_filters import FirstFilterWatch
from .inputs import ExampleInputs, floating_dtype, to_model
from .latency_budget import measured_seconds
from .latency_cost import measure_latency_cost
from .learning import MaskLearner
from .outcome import BudgetReport, FirstFilters, PruneReport
from .recalibration import recalibrate, wanted_batches
from .reconfigure import Reconfigurer
from .reconstruction import reconstruct
from .redundancy import warn_if_symmetric
from .skipping import DeadChannelSkipper
from .step_work import StepWork
from .weights import WeightKeeper

#: how often a layer that dies is compared anew if the network is cut at epoch ends: what dies in between is little
_STEPS_BETWEEN_CUTS = 2
#: averages a tensor over the ranks of a distributed run
Reduce = Callable[[Tensor], Tensor]

_log = logging.getLogger(__name__)


class PruningFit:
    """State of one fit: the traced graph, the learner while learning, the plan once channels are selected.

    Args:
        config: validated arguments.
        model: the network; traced here, changed only by the methods that say so.
        inputs: example inputs for its ``forward``.

    Raises:
        TraceError: ``forward`` fails on the inputs, or there is nothing to prune.
        PlanError: the given plan was made for another model.
        BudgetError: the target cannot be reached.
    """

    def __init__(self, config: PruneConfig, model: nn.Module, inputs: ExampleInputs) -> None:
        self.config, self.inputs = config, inputs
        self.graph = trace_channels(model, inputs)
        self.macs, self.params = CostModel(self.graph, "macs"), CostModel(self.graph, "params")
        self.cost: Cost = self.params if config.metric == "params" else self.macs
        #: multiply-accumulates of one sample that a step really computes, if ``counted`` since anything has changed
        self.step_macs, self.counted = self.macs.dense, False
        self._work = StepWork(self.graph)
        self._first_filters: FirstFilterWatch | None = None
        self.keeper: WeightKeeper | None = None
        self._auto = config.cuts_unasked
        self.early: dict[str, Tensor] | None = None
        self._start_anew()
        self.budget: BudgetReport | None = None
        self._network_calls = logit_calls(model, self._inputs_for(model)) if config.distill else []
        self.chooser: MaskChooser | None = None
        if config.plan is not None:
            config.plan.check_model(self.graph.tensors)
            config.plan.mask(self.graph)
        else:
            removable = None
            if config.remove_branches:
                removable = removable_branches(model, to_model(inputs, model), self.graph)
            self.chooser = MaskChooser(config, self.graph, self.cost, removable)
            if config.metric != "latency":  # which is measured when the model is on its device
                self.chooser.check()  # an unreachable budget shows now, not after learning

    def _start_anew(self) -> None:
        """No channel is dead, and nothing is hung on the model; what a fit that goes on had is in its state."""
        self.plan: CompactionPlan | None = None
        self.learner: MaskLearner | None = None
        self.skipper: DeadChannelSkipper | None = None
        self.reconfigurer: Reconfigurer | None = None
        self.distiller: Distiller | None = None
        self._held: Mask = np.ones(self.graph.num_channels, dtype=bool)

    # ---- phases ----------------------------------------------------------------------------------------------------

    def begin(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        learn_steps: int,
        progress: Callable[[int, int, str], None] | None = None,
        *,
        optimizers: Callable[[], Iterable[torch.optim.Optimizer]] = tuple,
        rewrap: Callable[[], None] = lambda: None,
        full_size: str | None = None,
        gradients_meet: bool = False,
    ) -> None:
        """The model is on its device: take up a checkpoint's ``state`` (empty: none), or hold the given plan.

        ``progress`` is told of the layers whose latency is measured, see ``measure_latency_cost``; ``optimizers`` and
        ``rewrap`` are for :class:`Reconfigurer`; ``full_size`` says why nothing is cut unless it is asked for;
        ``gradients_meet``: a weight's step may depend on the gradients of others.
        """
        config = self.config
        self._start_anew()
        self.keeper = WeightKeeper(model, self.graph, optimizers if config.dead_channel_skipping else tuple)
        if config.metric == "latency" and self.chooser is not None:
            self.cost = measure_latency_cost(model, self._inputs_for(model), self.graph, progress)
            self.chooser.cost = self.cost
            self.chooser.check()
        if config.dead_channel_skipping:
            steps = _STEPS_BETWEEN_CUTS if config.cut_every else 10
            inputs = self._inputs_for(model)
            self.skipper = DeadChannelSkipper(model, self.graph, inputs, steps=steps)
            matter = gradients_meet and dead_weights_matter(model, self.graph, inputs, optimizers())
            self._skips = not matter
        if self._auto and full_size is not None:
            _log.info("dead channels stay in the network while it trains: %s", full_size)
        elif config.reconfigure_every_n_epochs:
            self.reconfigurer = Reconfigurer(model, self.graph, optimizers, rewrap, self._follow)
        if config.distill:
            self.distiller = Distiller(self._network_calls, config.distill, config.distill_temperature)
            if state.get("teacher") is not None or config.plan is not None:
                self.distiller.remember(model, state.get("teacher"))
            self.distiller.attach(model)
        self._first_filters = FirstFilterWatch(self.graph, model, self.keeper, state.get("filters"))
        self.early = state.get("early")
        if state.get("plan") is not None:
            self.hold(CompactionPlan.from_json(state["plan"], "the checkpoint"))
        elif state.get("learner") is not None:
            learner = self.start_learning(model, learn_steps)
            learner.load_state_dict(state["learner"])
            if self.config.sphere:
                self.keeper.remember_radii(state["radii"])
            self._set_mask(learner.held())
        elif self.config.plan is not None:
            self.hold(self.config.plan)
        else:
            warn_if_symmetric(model, self.graph)
        if self.plan is not None:
            self.reconfigure(model)
        elif state.get("cut"):
            mask = np.ones(self.graph.num_channels, dtype=bool)
            mask[state["cut"]] = False
            self._cut(model, mask)

    def start_learning(self, model: nn.Module, steps: int) -> MaskLearner:
        """Hang the gates on the model; the network as it is now becomes the teacher."""
        assert self.keeper is not None
        assert self.chooser is not None
        self._teach(model)
        self.learner = MaskLearner(
            model, self.graph, self.cost, self.config, self.chooser, steps, self._at_full_size
        )
        self.learner.gates.attach()
        if self.config.sphere:
            self.keeper.remember_radii()
        return self.learner

    def _teach(self, model: nn.Module) -> None:
        if self.distiller is not None and self.distiller.teacher is None:
            self.distiller.remember(model)

    def select(self, model: nn.Module, data: Sequence[Any] = (), reduce: Reduce | None = None) -> None:
        """The last word: a hard selection that meets the budget; gates are folded into the weights and gone.

        With ``rewind_to`` the weights go back to those of that step; with ``reconstruct`` the consumers of removed
        channels are refitted on ``data``; with ``recalibrate`` batch norm statistics are taken anew on it, averaged over
        ranks by ``reduce``.
        """
        assert self.keeper is not None
        assert self.chooser is not None
        if self.reconfigurer is not None:
            self.reconfigurer.widen()
        self._teach(model)
        if self.learner is not None:
            by_weight = saliency("magnitude", model, self.graph)
            values, alive = self.learner.saliency(by_weight), self.learner.held()
            self.learner.gates.detach()
            if self.early is None:
                self.keeper.fold(self.learner.gates.final())
            self.learner = None
        else:
            values, alive = saliency(self.config.method, model, self.graph, self.config.seed), None
        mask = self.chooser.final(model, self._inputs_for(model), values, alive)
        plan = CompactionPlan.from_mask(self.graph, mask, remove_branches=self.config.remove_branches)
        if self.early is not None:
            model.load_state_dict(self.early)
            self.early = None
        elif self.config.reconstruct and data:
            fitted, _ = reconstruct(model, self._inputs_for(model), plan, data)
            model.load_state_dict(fitted.state_dict())
        self.hold(plan)
        self.recalibrate(model, data, reduce)
        self.reconfigure(model)

    def reconfigure(self, model: nn.Module) -> bool:
        """Cut what is dead for good out of the network, if that is wanted; returns whether anything was.

        Raises:
            CompactionError: the smaller network fails or differs; the model is full-size then.
        """
        worth = self.plan is not None
        if self.reconfigurer is not None and self.learner is not None:
            worth = not self._auto or self.reconfigurer.worthwhile(self._held, self.macs)
        return worth and self._cut(model, self._held)

    def _cut(self, model: nn.Module, mask: Mask) -> bool:
        if self.reconfigurer is None:
            return False
        try:
            return self.reconfigurer.cut(mask, self._inputs_for(model))
        except CompactionError as error:
            if not self._auto:
                raise
            _log.info("dead channels stay in the network while it trains: %s", error)
            self.reconfigurer = None
            return False

    def _follow(self, graph: ChannelGraph) -> None:
        """The network's tensors have been cut, or are whole again."""
        assert self.keeper is not None
        self.keeper.follow(graph)
        if self.learner is not None:
            self.learner.gates.follow(graph)
        if self.skipper is not None:
            self.skipper.follow(graph)
        self._set_mask(self._held)

    def recalibrate(self, model: nn.Module, data: Sequence[Any], reduce: Reduce | None = None) -> None:
        """Batch norm statistics of the masked network from ``data``, if they are wanted."""
        if self.config.recalibrate and data:
            recalibrate(model, data[-wanted_batches(self.config.recalibrate) :], reduce)

    def remember(self, model: nn.Module) -> None:
        """Keep the present weights to rewind to (lottery tickets, Frankle and Carbin 2019)."""
        self.early = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def hold(self, plan: CompactionPlan) -> None:
        """From now on the removed channels are exactly zero."""
        assert self.keeper is not None
        self.plan = plan
        if self.distiller is not None:
            self.distiller.active = True
        self._set_mask(mask := plan.mask(self.graph))
        self.keeper.zero_dead()
        if self.config.plan is None and self.config.metric != "latency":
            self.budget = BudgetReport.counted(
                self.graph, self.cost, mask, self.config.target, self.config.round_to
            )

    def _set_mask(self, mask: Mask, now: bool = True) -> None:
        assert self.keeper is not None
        self._held = mask
        self.keeper.set_mask(mask)
        self.counted = False
        if self.skipper is not None and self._skips:
            self.skipper.set_mask(mask, now)

    def release(self) -> None:
        """Take every hook off the model, which is full-size again."""
        gates = self.learner.gates if self.learner is not None else None
        for part in (gates, self.skipper, self.keeper, self.distiller):
            if part is not None:
                part.detach()
        if self.reconfigurer is not None:
            self.reconfigurer.widen()

    def _inputs_for(self, model: nn.Module) -> ExampleInputs:
        """On the model's device and, in a true half or double precision fit, in its dtype."""
        return to_model(self.inputs, model, floating_dtype(model))

    def compact(self, model: nn.Module) -> tuple[nn.Module, PruneReport]:
        """The smaller copy of ``model``, proven equal, and the report. Only after :meth:`select` or :meth:`hold`."""
        assert self.plan is not None
        self.release()
        inputs = self._inputs_for(model)
        smaller = compact(model, inputs, self.plan).eval()
        error = max_relative_error(mask_channels(model, inputs, self.plan), smaller, inputs)
        if self.config.metric == "latency" and self.config.plan is None:  # as it is, compacted, here and now
            seconds = measured_seconds(model, lambda: smaller, inputs)
            self.budget = BudgetReport.measured(
                self.cost, self.plan.mask(self.graph), self.config.target, seconds
            )
        return smaller, PruneReport.of(self.graph, self.plan, error, self.budget)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def before_step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        gates_too: bool,
        reduce: Reduce,
        loss_scale: float,
    ) -> None:
        """Gradients are complete: penalise the weights and, once per step, move the gates."""
        learner, keeper = self.learner, self.keeper
        assert learner is not None
        assert keeper is not None
        keeper.penalise(optimizer, self.config.weight_l1, self.config.weight_l2)
        if gates_too:
            self._freeze_weights = learner.alternating_on_gates()
            learner.gates.synchronise(reduce)
            learner.unscale(loss_scale)
            if learner.step():
                self._set_mask(learner.held(), now=False)
        if self._freeze_weights:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    _freeze_weights, _skips = False, True

    def count_work(self, model: nn.Module) -> None:
        """The forward pass of a step has run: see what it has left out."""
        if not self.counted:
            present = np.ones_like(self._held) if self.reconfigurer is None else self.reconfigurer.mask
            self.step_macs, self.counted = self._work.count(model, present, self.skipper), True

    def after_step(self) -> None:
        """The optimizer has moved the weights: dead ones back to zero, filters back to their sphere."""
        if self.keeper is not None:
            self.keeper.zero_dead()  # before: what a dead channel's reader has picked up is no part of its norm
            if self.learner is not None and self.config.sphere:
                self.keeper.project_to_sphere()
        if self.reconfigurer is not None:
            self.reconfigurer.check_optimizers()

    @property
    def nothing_dead(self) -> bool:
        """Whether all channels live."""
        return bool(self._held.all())

    def _at_full_size(self) -> contextlib.AbstractContextManager[None]:
        """The tensors at full size for a moment, for whoever reads them in dense numbering."""
        return self.reconfigurer.full_size() if self.reconfigurer is not None else contextlib.nullcontext()

    # ---- records ---------------------------------------------------------------------------------------------------

    def mask(self) -> Mask:
        """Live channels at present."""
        if self.plan is not None:
            return self.plan.mask(self.graph)
        return (
            self.learner.mask() if self.learner is not None else np.ones(self.graph.num_channels, dtype=bool)
        )

    def first_filters(self) -> FirstFilters | None:
        """Filters of the first convolution when the fit began and now; None without a convolution."""
        watch = self._first_filters
        return watch.now(self.mask(), self._at_full_size()) if watch is not None else None

    def record(self) -> dict[str, float]:
        """Present cost, live channels and penalty strength."""
        mask = self.mask()
        return {
            "macs": self.macs.cost(mask),
            "params": self.params.cost(mask),
            "live_channels": int(mask.sum()),
            "lambda": self.learner.strength if self.learner is not None else 0.0,
            **({"distill": self.distiller.mean()} if self.distiller is not None else {}),
        }

    def gates(self) -> dict[str, list[float]]:
        """Gate values per group: learned while learning, else 0 and 1."""
        if self.learner is not None:
            return self.learner.gates_by_group()
        mask = self.mask()
        return {g.name: mask[g.ids].astype(float).tolist() for g in self.graph.groups}

    def report(self) -> PruneReport | None:
        """Sizes, once channels are selected."""
        return PruneReport.of(self.graph, self.plan, None, self.budget) if self.plan is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed fit needs."""
        return {
            "plan": self.plan.to_json() if self.plan is not None else None,
            "learner": self.learner.state_dict() if self.learner is not None else None,
            "early": self.early,
            "cut": np.flatnonzero(~self.reconfigurer.mask).tolist() if self.reconfigurer is not None else [],
            **(self._first_filters.state() if self._first_filters is not None else {}),
            "teacher": self.distiller.teacher_state() if self.distiller is not None else None,
            "radii": self.keeper.radii() if self.keeper is not None else [],
        }
