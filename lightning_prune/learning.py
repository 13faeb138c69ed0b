"""The learn phase: gates, controller and snapping together, independent of any trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .budget import PenaltyController, ramped_target
from .channels.groups import ChannelGraph, Mask
from .config import PruneConfig
from .cost import Cost
from .gates import LEARNED
from .scope import fixed_shares

#: how strongly a channel's price weighs in its penalty
PRICE_EXPONENT = 0.5


def default_gate_lr(steps: int) -> float:
    """Gates must be able to travel from 1 to 0 several times within the learn phase of ``steps`` optimizer steps."""
    return float(min(0.05, max(1e-3, 10.0 / max(steps, 1))))


class MaskLearner:
    """Learns which channels to keep.

    Each optimizer step: :meth:`step` moves the gates by the gradient the backward pass left on them, shrinks them by the
    controller's penalty weighted with each channel's price, and snaps gates that fell under the threshold, as long as the
    budget is not undercut.

    Args:
        model: the network; only hooks are added to it, while attached.
        graph: its traced channels.
        cost: prices masks in the metric of the budget.
        config: see ``ChannelPruning``.
        protected: bool mask of channels that must stay.
        steps: optimizer steps in the learn phase, for the ramp of the target and default learning rates.
        removable: bool mask of channels whose whole group may go.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        cost: Cost,
        config: PruneConfig,
        protected: Mask,
        steps: int,
        removable: Mask | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.graph, self.cost, self.config, self.steps = graph, cost, config, max(steps, 1)
        kind = LEARNED[config.method]
        lr = config.gate_lr if config.gate_lr is not None else kind.span * default_gate_lr(steps)
        self.gates = kind(
            model, graph, torch.from_numpy(~protected).to(device), lr, config.snap_threshold, self.steps,
            **config.method_options,
        )  # fmt: skip
        #: channels whose gates learn; fixed from here on, so that no step waits for the device to tell
        self.trainable: Mask = np.asarray(self.gates.trainable.cpu().numpy(), dtype=bool)
        self.controller = PenaltyController(lr=10.0 / self.steps)
        self.done = 0
        self.strength = 0.0
        self._group_of = graph.group_of()
        least = max(config.min_channels, 1)
        self._least = [0 if removable is not None and removable[g.start] else least for g in graph.groups]
        # layers with a width of their own are ranked by their gates, not pressed, and count as what will be left of them
        self._share = fixed_shares(graph, config.ratios)

    def mask(self) -> Mask:
        """Channels that are not dead yet, bool of shape [num_channels]."""
        return ~np.asarray(self.gates.dead.cpu().numpy(), dtype=bool)

    def alternating_on_weights(self) -> bool:
        """In push-pull training: whether it is the weights' turn (gates stand still)."""
        n = self.config.alternate_every_n_steps
        return n > 0 and (self.done // n) % 2 == 0

    def alternating_on_gates(self) -> bool:
        """In push-pull training: whether it is the gates' turn (weights stand still)."""
        n = self.config.alternate_every_n_steps
        return n > 0 and not self.alternating_on_weights()

    def step(self) -> bool:
        """One step on the gradients present; returns whether channels died."""
        if self.alternating_on_weights():
            for parameter in self.gates.parameters():
                parameter.grad = None
            self.done += 1
            return False
        gates, dense, mask = self.gates, self.cost.dense, self.mask()
        if not gates.penalised:
            gates.update(torch.zeros(len(mask), device=gates.dead.device))
            self.done += 1
            return False
        aim = ramped_target(self.config.target, self.done / self.steps, self.config.ramp)
        presence = gates.presence().cpu().numpy().astype(np.float64)
        # early on what is on its way out counts in part, or everything in flight would overshoot; in the end only what
        # is really gone counts
        progress = min(1.0, self.done / self.steps)
        soft, hard = self.cost.cost(presence * self._share), self.cost.cost(mask * self._share)
        cost = ((1 - progress) * soft + progress * hard) / dense
        self.strength = self.controller.step(cost, aim)
        price = self.cost.marginal(mask.astype(np.float64)) * self._live_share(mask)
        free = self.trainable & mask
        mean = price[free].mean() if free.any() else 1.0
        relative = np.clip((price / max(mean, 1e-30)) ** PRICE_EXPONENT, 0.1, 10.0) * (self._share == 1.0)
        gates.update(torch.from_numpy(self.strength * relative).float().to(gates.dead.device))
        self.done += 1
        return self._snap(mask)

    def _live_share(self, mask: Mask) -> np.ndarray:
        """Live share of each channel's group: the thinner a layer already is, the less it is pressed further."""
        shares = np.array([mask[g.ids].mean() for g in self.graph.groups])
        return shares[self._group_of]

    def _snap(self, mask: Mask) -> bool:
        """Kill gates under the threshold, smallest first, as long as the cost stays above the target."""
        limit = self.config.target * self.cost.dense
        counts = np.array([int(mask[g.ids].sum()) for g in self.graph.groups])
        chosen = []
        for channel in self.gates.candidates().tolist():
            group = self._group_of[channel]
            if self._share[channel] < 1.0 or counts[group] <= self._least[group]:
                continue
            mask[channel] = False
            if self.cost.cost(mask * self._share) < limit:
                mask[channel] = True
                continue
            counts[group] -= 1
            chosen.append(channel)
        if chosen:
            self.gates.snap(torch.tensor(chosen, device=self.gates.dead.device))
        return bool(chosen)

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
        values = self.gates.multipliers(training=False).detach().cpu()
        return {g.name: [round(v, 6) for v in values[g.ids].tolist()] for g in self.graph.groups}

    def unscale(self, scale: Tensor | float) -> None:
        """Divide the gradients by a loss scaler's factor; gradients that overflowed are dropped."""
        for parameter in self.gates.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
                if not torch.isfinite(parameter.grad).all():
                    parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed fit needs."""
        return {"gates": self.gates.state_dict(), "controller": self.controller.state_dict(), "done": self.done,
                "strength": self.strength, "steps": self.steps}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.gates.load_state_dict(state["gates"])
        self.controller.load_state_dict(state["controller"])
        self.done, self.strength, self.steps = state["done"], state["strength"], state["steps"]
