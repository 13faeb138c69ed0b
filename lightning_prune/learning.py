"""The learn phase: gates, controller and snapping together, independent of any trainer.

Two ways lead to the budget. *Learn, then snap*: a penalty drives gates to zero, and those that arrive are snapped. *Gradual*:
methods that only measure choose anew which channels to mask every so many steps, under a budget that tightens along the ramp
(Zhu and Gupta 2017). Until ``reentry_until`` of the phase what is masked only rests: the network computes without it, but it
goes on learning and comes back when it matters again (soft pruning, He et al. 2018); from then on masks only shrink, and the
weights of what is gone are zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .budget import PenaltyController, ramped_target
from .channels.groups import ChannelGraph, Mask
from .choosing import MaskChooser
from .config import PruneConfig
from .cost import Cost
from .criteria import saliency
from .errors import PruneError
from .gates import LEARNED, CriterionGates, Gates, Measured
from .gates.attach import consumer_channels
from .scope import fixed_shares, group_factors
from .selection import scarcity

#: so many steps may pass before the gates have their first gradient: other optimizers' steps count too
_MOST_UNHEARD = 20


def default_gate_lr(steps: int) -> float:
    """Gates must be able to travel from 1 to 0 several times within the learn phase of ``steps`` optimizer steps."""
    return float(min(0.05, max(1e-3, 10.0 / max(steps, 1))))


class MaskLearner:
    """Learns which channels to keep.

    Each optimizer step: :meth:`step` moves the gates by the gradient the backward pass left on them, shrinks them by the
    controller's penalty weighted with each channel's price, and snaps gates that fell under the threshold, as long as the
    budget is not undercut. Methods without a penalty have their masks chosen at intervals instead.

    Args:
        model: the network; only hooks are added to it, while attached.
        graph: its traced channels.
        cost: prices masks in the metric of the budget.
        config: see ``ChannelPruning``.
        chooser: selects under the budget of the moment.
        steps: optimizer steps in the learn phase, for the ramp of the target and default learning rates.
        full_size: makes a context in which the model's tensors have their dense shapes, for criteria that read them.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        cost: Cost,
        config: PruneConfig,
        chooser: MaskChooser,
        steps: int,
        full_size: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        device = next(model.parameters()).device
        self.graph, self.cost, self.config, self.steps = graph, cost, config, max(steps, 1)
        self._model, self._choose, self._full_size = model, chooser.on_the_way, full_size
        kind = LEARNED.get(config.method, CriterionGates)
        lr = config.gate_lr if config.gate_lr is not None else kind.span * default_gate_lr(steps)
        make: Callable[..., Gates] = kind
        if kind is CriterionGates:
            make = partial(CriterionGates, criterion=config.method, seed=config.seed)
        self.gates = make(
            model, graph, torch.from_numpy(~chooser.protected).to(device), lr, config.snap_threshold, self.steps,
            **config.method_options,
        )  # fmt: skip
        self.gates.soft = config.reentry_until > 0
        #: channels whose gates learn; fixed from here on, so that no step waits for the device to tell
        self.trainable: Mask = np.asarray(self.gates.trainable.cpu().numpy(), dtype=bool)
        self.controller = PenaltyController(lr=10.0 / self.steps)
        self.done = 0
        self.strength = 0.0
        self._heard, self._unheard = False, 0
        self._group_of = graph.group_of()
        least = max(config.min_channels, 1)
        removable = chooser.removable
        self._least = [0 if removable is not None and removable[g.start] else least for g in graph.groups]
        # layers with a width of their own are ranked by their gates, not pressed, and count as what will be left of them
        self._share = fixed_shares(graph, config.ratios)
        self._factor = group_factors(graph, config.penalty_weights)
        self._gateable = np.asarray(consumer_channels(graph).numpy(), dtype=bool)
        #: masked for now, may come back
        self.resting: Mask = np.zeros(graph.num_channels, dtype=bool)

    def held(self) -> Mask:
        """Channels that are not gone for good, bool of shape [num_channels]."""
        return ~np.asarray(self.gates.dead.cpu().numpy(), dtype=bool)

    def mask(self) -> Mask:
        """Channels that the network computes with, bool of shape [num_channels]."""
        return self.held() & ~self.resting

    @property
    def open(self) -> bool:
        """Whether masked channels may come back, at the present step."""
        return self.done < self.config.reentry_until * self.steps

    def alternating_on_weights(self) -> bool:
        """In push-pull training: whether it is the weights' turn (gates stand still)."""
        n = self.config.alternate_every_n_steps
        return n > 0 and (self.done // n) % 2 == 0

    def alternating_on_gates(self) -> bool:
        """In push-pull training: whether it is the gates' turn (weights stand still)."""
        n = self.config.alternate_every_n_steps
        return n > 0 and not self.alternating_on_weights()

    def step(self) -> bool:
        """One step on the gradients present; returns whether channels are gone for good that were not before."""
        if self.alternating_on_weights():
            for parameter in self.gates.parameters():
                parameter.grad = None
            self.done += 1
            return False
        gates, dense, mask = self.gates, self.cost.dense, self.mask()
        if not gates.penalised:
            gates.update(torch.zeros(len(mask), device=gates.dead.device))
            self.done += 1
            due = isinstance(gates, Measured) and self.done % gates.interval == 0
            return self._choose_anew() if due else False
        aim = ramped_target(self.config.target, self.done / self.steps, self.config.ramp)
        presence = gates.presence().cpu().numpy().astype(np.float64)
        # early on what is on its way out counts in part, or everything in flight would overshoot; in the end only what
        # is really gone counts
        progress = min(1.0, self.done / self.steps)
        soft, hard = self.cost.cost(presence * self._share), self.cost.cost(mask * self._share)
        cost = ((1 - progress) * soft + progress * hard) / dense
        self.strength = self.controller.step(cost, aim)
        price = self.cost.marginal(mask.astype(np.float64)) * scarcity(self.graph, mask)
        free = self.trainable & mask
        mean = price[free].mean() if free.any() else 1.0
        relative = np.clip((price / max(mean, 1e-30)) ** gates.price_exponent, 0.1, 10.0) * (
            self._share == 1.0
        )
        relative = relative * self._factor
        gates.update(torch.from_numpy(self.strength * relative).float().to(gates.dead.device))
        self.done += 1
        return self._snap(mask)

    def _choose_anew(self) -> bool:
        """Gradual pruning: the masks that the saliencies of the moment and the ramped budget ask for."""
        held, live = self.held(), self.mask()
        with self._full_size():
            values = self.saliency(saliency("magnitude", self._model, self.graph))
        wanted = self._choose(values, held if self.open else live, self.done / self.steps)
        gone = held & ~wanted
        return self._put_away(gone & self._gateable if self.open else np.zeros_like(gone), gone)

    def _put_away(self, resting: Mask, gone: Mask) -> bool:
        """Let ``resting`` rest, and the others of ``gone`` go for good; returns whether there were any."""
        if not np.array_equal(resting, self.resting):
            self.resting = resting
            self.gates.rest(torch.from_numpy(resting).to(self.gates.dead.device))
        dying = np.flatnonzero(gone & ~resting)
        if len(dying):
            self.gates.snap(torch.from_numpy(dying).to(self.gates.dead.device))
        return bool(len(dying))

    def _snap(self, mask: Mask) -> bool:
        """Mask gates under the threshold, smallest first, as long as the cost stays above the target.

        For good; or, while channels may come back, until they are over the threshold again.
        """
        limit = self.config.target * self.cost.dense
        candidates = self.gates.candidates().tolist()
        if self.resting.any():
            small = np.zeros_like(mask)
            small[candidates] = True
            mask = mask | (self.resting & ~small)
        counts = np.array([int(mask[g.ids].sum()) for g in self.graph.groups])
        chosen = []
        for channel in candidates:
            if not mask[channel]:
                continue
            group = self._group_of[channel]
            if self._share[channel] < 1.0 or counts[group] <= self._least[group]:
                continue
            mask[channel] = False
            if self.cost.cost(mask * self._share) < limit:
                mask[channel] = True
                continue
            counts[group] -= 1
            chosen.append(channel)
        gone = self.resting & ~mask
        gone[chosen] = True
        return self._put_away(gone if self.open else np.zeros_like(gone), gone)

    def saliency(self, otherwise: np.ndarray) -> np.ndarray:
        """What the gates learned, shape [num_channels]; channels without a gate rank above, by ``otherwise``."""
        values = self.gates.saliency().cpu().numpy().astype(np.float64)
        above = (
            otherwise
            - otherwise.min()
            + (values[self.trainable].max() if self.trainable.any() else 0.0)
            + 1e-9
        )
        return np.where(self.trainable, values, above)

    def gates_by_group(self) -> dict[str, list[float]]:
        """Gate values per group."""
        values = self.gates.effective(training=False).detach().cpu()
        return {g.name: [round(v, 6) for v in values[g.ids].tolist()] for g in self.graph.groups}

    def unscale(self, scale: Tensor | float) -> None:
        """Divide the gradients by a loss scaler's factor; gradients that overflowed are dropped.

        Raises:
            PruneError: in its first steps the loss has not reached the gates.
        """
        self._listen()
        for parameter in self.gates.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
                if not torch.isfinite(parameter.grad).all():
                    parameter.grad = None

    def _listen(self) -> None:
        """Gates that are no part of what is computed would be moved by the penalty alone."""
        if self._heard or not self.gates.parameters():
            return
        grads = [p.grad for p in self.gates.parameters() if p.grad is not None]
        self._heard = any(bool(grad.count_nonzero()) for grad in grads)
        self._unheard += not self._heard
        if self._unheard >= min(_MOST_UNHEARD, self.steps):
            raise PruneError(
                f"the gates have had no gradient in the first {self._unheard} steps of learning, so that channels would be "
                "pruned by their price alone: training_step computes its loss with a copy of the network, or with code that "
                "was made of it before (a script, an exported graph), or without gradients."
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed fit needs."""
        return {"gates": self.gates.state_dict(), "controller": self.controller.state_dict(), "done": self.done,
                "strength": self.strength, "steps": self.steps}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.gates.load_state_dict(state["gates"])
        self.controller.load_state_dict(state["controller"])
        self.done, self.strength, self.steps = state["done"], state["strength"], state["steps"]
        self.resting = np.asarray(self.gates.resting.cpu().numpy(), dtype=bool).copy()
