"""What a pruning run achieved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .channels.groups import ChannelGraph
from .compaction import CompactionPlan
from .cost import CostModel


@dataclass(frozen=True)
class PruneReport:
    """Sizes before and after, and how closely the compact network equals the masked one.

    Attributes:
        macs_dense / macs_compact: multiply-accumulates per sample.
        params_dense / params_compact: parameter elements.
        widths: ``{group: (live channels, dense channels)}``.
        frozen: why the other dimensions were not pruned.
        max_relative_error: compact against masked network on the example input; None until compacted.
        training_macs: multiply-accumulates of all training steps so far (forward and backward), without those of channels
            whose weights are zero; what training costs where dead channels are skipped. None outside a fit.
        training_macs_dense: the same for a dense fit of as many steps.
    """

    macs_dense: float
    macs_compact: float
    params_dense: float
    params_compact: float
    widths: Mapping[str, tuple[int, int]]
    frozen: Mapping[str, str]
    max_relative_error: float | None = None
    training_macs: float | None = None
    training_macs_dense: float | None = None

    @classmethod
    def of(
        cls, graph: ChannelGraph, plan: CompactionPlan, max_relative_error: float | None = None
    ) -> PruneReport:
        """Report for a plan on a traced network."""
        mask = plan.mask(graph)
        macs, params = CostModel(graph, "macs"), CostModel(graph, "params")
        frozen = {name: str(why) for name, why in graph.frozen.items()}
        widths = plan.widths
        return cls(
            macs.dense, macs.cost(mask), params.dense, params.cost(mask), widths, frozen, max_relative_error
        )

    @property
    def live_channels(self) -> int:
        """Prunable channels that are left, over all groups."""
        return int(np.sum([live for live, _ in self.widths.values()]))

    @property
    def removed_branches(self) -> tuple[str, ...]:
        """Groups that lost all their channels: their branches are gone."""
        return tuple(name for name, (live, _) in self.widths.items() if live == 0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"MACs    {self.macs_dense:,.0f} -> {self.macs_compact:,.0f} ({self.macs_compact / self.macs_dense:.1%})",
            f"params  {self.params_dense:,.0f} -> {self.params_compact:,.0f} ({self.params_compact / self.params_dense:.1%})",
            "widths  " + ", ".join(f"{name} {live}/{size}" for name, (live, size) in self.widths.items()),
        ]
        if self.removed_branches:
            lines.append(f"removed branches  {', '.join(self.removed_branches)}")
        if self.max_relative_error is not None:
            lines.append(
                f"compact against masked network: largest relative error {self.max_relative_error:.2g}"
            )
        if self.training_macs is not None and self.training_macs_dense:
            share = self.training_macs / self.training_macs_dense
            lines.append(
                f"training MACs  {self.training_macs:.3g} of the dense fit's {self.training_macs_dense:.3g} ({share:.1%})"
            )
        return "\n".join(lines)
