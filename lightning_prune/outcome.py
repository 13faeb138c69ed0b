"""What a pruning run achieved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .channels.groups import ChannelGraph, Mask
from .compaction import CompactionPlan
from .cost import Cost, CostModel
from .latency_budget import LATENCY_TOLERANCE
from .selection import smallest_addition

_COUNTED_TOLERANCE = 0.01


@dataclass(frozen=True)
class BudgetReport:
    """How closely a budget was met.

    Attributes:
        metric: ``"macs"``, ``"params"`` or ``"latency"``.
        target: share of the dense cost that was asked for.
        share: share that the compact network has; for a latency, as measured.
        tolerance: a budget is met when ``share`` is at most so much (relative) under the target.
        predicted: for a latency, the share that the table of layers predicted.
        seconds: for a latency, median time of a call of the dense and of the compact network, measured in turn.
        smallest_addition: share of the dense cost of the cheapest channels that were removed (``round_to`` of them); None
            when there are none or the cost is measured.
    """

    metric: str
    target: float
    share: float
    tolerance: float
    predicted: float | None = None
    seconds: tuple[float, float] | None = None
    smallest_addition: float | None = None

    @classmethod
    def counted(
        cls, graph: ChannelGraph, cost: Cost, mask: Mask, target: float, round_to: int = 1
    ) -> BudgetReport:
        """For a metric that is counted."""
        more = smallest_addition(graph, cost, mask, round_to)
        more = None if more is None else more / cost.dense
        share = cost.cost(mask) / cost.dense
        return cls(cost.metric, target, share, _COUNTED_TOLERANCE, smallest_addition=more)

    @classmethod
    def measured(cls, cost: Cost, mask: Mask, target: float, seconds: tuple[float, float]) -> BudgetReport:
        """For a latency: predicted by ``cost``, and the measured ``seconds`` of dense and compact network."""
        predicted, share = cost.cost(mask) / cost.dense, seconds[1] / seconds[0]
        return cls(cost.metric, target, share, LATENCY_TOLERANCE, predicted, seconds)

    @property
    def met(self) -> bool:
        """Whether the cost is under the target by at most the tolerance."""
        return (1 - self.tolerance) * self.target <= self.share <= self.target * (1 + 1e-12)

    def __str__(self) -> str:
        text = f"budget  {self.target:.1%} of the dense {self.metric}: {self.share:.2%}"
        if self.seconds is not None:
            dense, compact = (1e3 * s for s in self.seconds)
            text += f" measured ({dense:.3f} ms -> {compact:.3f} ms), {self.predicted:.2%} predicted"
        if self.met:
            return text
        if self.share > self.target:
            return f"{text}; over the target" + (" on this run of the clock" if self.seconds else "")
        why = (
            "no widths that were tried come closer from below" if self.seconds else "nothing more can be kept"
        )
        if self.smallest_addition is not None:
            fits = self.share + self.smallest_addition <= self.target
            why = f"the cheapest channels that were removed cost {self.smallest_addition:.2%}"
            why += ", and the masks or ratios rule them out" if fits else ""
        return f"{text}; more than {self.tolerance:.0%} under the target: {why}"


@dataclass(frozen=True)
class FirstFilters:
    """Filters of the first convolution, before the fit and now.

    Attributes:
        module: name of the convolution.
        before: weights when the fit began, shape [filters, channels, ...], on the CPU.
        after: weights now, the same shape; zero where a filter was removed.
        live: bool of shape [filters], False where it was removed.
    """

    module: str
    before: Tensor
    after: Tensor
    live: Tensor


@dataclass(frozen=True)
class PruneReport:
    """Sizes before and after, and how closely the compact network equals the masked one.

    Attributes:
        macs_dense / macs_compact: multiply-accumulates per sample.
        params_dense / params_compact: parameter elements.
        widths: ``{group: (live channels, dense channels)}``.
        frozen: why the other dimensions were not pruned.
        max_relative_error: compact against masked network on the example input; None until compacted.
        budget: how closely the budget was met; None for a given plan.
        training_macs: multiply-accumulates of all training steps so far (forward and backward), without those of channels
            that were cut out or skipped; channels that are merely zero count. None outside a fit, as all that follow.
        training_macs_dense: the same for a dense fit of as many steps.
        activation_memory: bytes that a training step keeps for its backward pass, parameters excluded, when last measured (in
            the first step of each epoch): not what a process occupies, which the CPU does not tell.
        activation_memory_dense: the same before any channel died; None if the fit never trained the dense network.
        peak_memory: on CUDA the largest number of bytes allocated in the last epoch.
        peak_memory_dense: the same in the first epoch of warmup; None without one.
        step_time: seconds per training step, data loading included, median of the last epoch.
        step_time_dense: the same, median over the epochs of warmup; None without any.
        samples_per_second: of this process, in the last epoch.
        training_seconds: time of all training steps so far, data loading included and validation not.
    """

    macs_dense: float
    macs_compact: float
    params_dense: float
    params_compact: float
    widths: Mapping[str, tuple[int, int]]
    frozen: Mapping[str, str]
    max_relative_error: float | None = None
    budget: BudgetReport | None = None
    training_macs: float | None = None
    training_macs_dense: float | None = None
    activation_memory: int | None = None
    activation_memory_dense: int | None = None
    peak_memory: int | None = None
    peak_memory_dense: int | None = None
    step_time: float | None = None
    step_time_dense: float | None = None
    samples_per_second: float | None = None
    training_seconds: float | None = None

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        plan: CompactionPlan,
        max_relative_error: float | None = None,
        budget: BudgetReport | None = None,
    ) -> PruneReport:
        """Report for a plan on a traced network."""
        mask = plan.mask(graph)
        macs, params = CostModel(graph, "macs"), CostModel(graph, "params")
        frozen = {name: str(why) for name, why in graph.frozen.items()}
        widths = plan.widths
        sizes = (macs.dense, macs.cost(mask), params.dense, params.cost(mask))
        return cls(*sizes, widths, frozen, max_relative_error, budget)

    @property
    def live_channels(self) -> int:
        """Prunable channels that are left, over all groups."""
        return int(np.sum([live for live, _ in self.widths.values()]))

    @property
    def saved_training_macs(self) -> float | None:
        """Share of the dense fit's multiply-accumulates that training has saved so far."""
        if self.training_macs is None or not self.training_macs_dense:
            return None
        return 1.0 - self.training_macs / self.training_macs_dense

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
        if self.budget is not None:
            lines.append(str(self.budget))
        if self.removed_branches:
            lines.append(f"removed branches  {', '.join(self.removed_branches)}")
        if self.max_relative_error is not None:
            lines.append(
                f"compact against masked network: largest relative error {self.max_relative_error:.2g}"
            )
        return "\n".join((*lines, *self._training()))

    def _training(self) -> Iterator[str]:
        """What the fit itself took."""
        if self.training_macs is not None and self.training_macs_dense:
            yield (
                f"training MACs  {self.training_macs:.3g} of the dense fit's {self.training_macs_dense:.3g} "
                f"({self.saved_training_macs:.1%} saved)"
            )
        if self.step_time and self.training_seconds:
            text = (
                f"training time  {self.training_seconds:.1f} s so far; a step {1e3 * self.step_time:.3g} ms"
            )
            if self.step_time_dense:
                dense = 1e3 * self.step_time_dense
                text += f", in the dense warmup {dense:.3g} ms ({self.step_time_dense / self.step_time:.2f}x)"
            yield f"{text}; {self.samples_per_second:.0f} samples/s"
        kinds = (
            ("activation memory (kept for a step's backward pass)", self.activation_memory, self.activation_memory_dense),
            ("peak of allocated memory in an epoch", self.peak_memory, self.peak_memory_dense),
        )  # fmt: skip
        for name, now, before in kinds:
            if now and before:
                yield f"{name}  {now / 2**20:.1f} MiB of the dense {before / 2**20:.1f} MiB ({now / before:.1%})"
