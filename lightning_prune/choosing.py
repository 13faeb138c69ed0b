"""Which channels stay, under the budget and everything else that the arguments of a fit ask for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from .budget import ramped_target
from .channels.groups import ChannelGraph, Mask
from .compaction.apply import clone_model
from .config import PruneConfig
from .cost import Cost
from .errors import BudgetError
from .inputs import ExampleInputs
from .latency_budget import select_measured
from .scope import fix_ratios, group_factors, protected_channels
from .selection import select_channels


class MaskChooser:
    """Turns saliencies into masks.

    Args:
        config: validated arguments; without a plan.
        graph: the traced channels.
        cost: prices masks; may be exchanged later.
        removable: bool mask of channels whose whole group may go.
    """

    def __init__(
        self, config: PruneConfig, graph: ChannelGraph, cost: Cost, removable: Mask | None = None
    ) -> None:
        self.config, self.graph, self.cost, self.removable = config, graph, cost, removable
        #: channels that must stay
        self.protected = protected_channels(graph, config.include, config.exclude, config.prune_streams)
        self._factors = group_factors(graph, config.penalty_weights)

    def check(self) -> None:
        """Raise BudgetError if no saliency at all could meet the budget."""
        self.choose(np.ones(self.graph.num_channels))

    def choose(
        self,
        values: np.ndarray,
        alive: Mask | None = None,
        share: float | None = None,
        ratios: Mapping[str, float] | None = None,
    ) -> Mask:
        """The mask for the saliencies ``values``; only ``alive`` channels may stay. By default the final budget and ratios."""
        if not self.config.penalised:  # where nothing is pressed, what would be pressed harder ranks lower
            values = values / self._factors
        if alive is not None:
            values = np.where(alive, values, values.min() - 1.0)
        eligible, kept = fix_ratios(self.graph, values, self.config.ratios if ratios is None else ratios)
        if alive is not None:
            eligible = eligible & (alive | kept)
        return select_channels(
            self.graph,
            values,
            self.cost,
            self.config.target if share is None else share,
            min_channels=self.config.min_channels,
            round_to=self.config.round_to,
            eligible=eligible,
            protected=(self.protected & eligible) | kept,
            removable=self.removable,
        )

    def on_the_way(self, values: np.ndarray, alive: Mask, progress: float) -> Mask:
        """What the ramped budget asks for after ``progress`` (0..1) of the learn phase."""
        config = self.config
        ratios = {name: ramped_target(r, progress, config.ramp) for name, r in (config.ratios or {}).items()}
        try:
            return self.choose(values, alive, ramped_target(config.target, progress, config.ramp), ratios)
        except (
            BudgetError
        ):  # only the end of the ramp was proven reachable; rounded ratios may miss it on the way
            return alive

    def final(self, model: nn.Module, inputs: ExampleInputs, values: np.ndarray, alive: Mask | None) -> Mask:
        """The last word: the counted budget, or a latency as measured on compact copies of ``model``."""
        if self.config.metric != "latency":
            return self.choose(values, alive)
        return select_measured(
            clone_model(model),  # without the hooks that skip dead channels
            inputs,
            self.graph,
            self.config.target,
            lambda share: self.choose(values, alive, share),
            values,
            round_to=self.config.round_to,
        ).mask
