"""Prune in one call, for plain PyTorch: trace, rank, select, compact, verify."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .branches import removable_branches
from .channels import trace_channels
from .channels.groups import Mask
from .compaction import CompactionPlan, compact, mask_channels, max_relative_error
from .config import check_choice, check_fraction, check_positive
from .cost import METRICS, Cost, CostModel
from .criteria import CRITERIA, saliency
from .inputs import ExampleInputs, to_model, without_labels
from .latency_budget import measured_seconds, select_measured
from .latency_cost import measure_latency_cost
from .outcome import BudgetReport, PruneReport
from .recalibration import check_recalibrate, wanted_batches
from .recalibration import recalibrate as retake_statistics
from .reconstruction import reconstruct as refit_consumers
from .scope import Patterns, check_patterns, check_ratios, fix_ratios, protected_channels
from .selection import select_channels


@dataclass(frozen=True)
class PruneResult:
    """A compact network, the plan that made it, and what it saves."""

    model: nn.Module
    plan: CompactionPlan
    report: PruneReport


def prune_channels(
    model: nn.Module,
    example_inputs: ExampleInputs,
    target: float = 0.5,
    metric: str = "macs",
    method: str = "magnitude",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    prune_streams: bool = False,
    ratios: Mapping[str, float] | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    remove_branches: bool = False,
    reconstruct: bool = False,
    recalibrate: bool | int = False,
    data: Iterable[Any] | None = None,
    seed: int = 0,
) -> PruneResult:
    """Remove the least salient channels of a trained network until it costs at most ``target`` of what it did.

    One shot, no training: finetune the result afterwards. To learn the masks, use the ``ChannelPruning`` callback.

    Args:
        model: any ``nn.Module``; untouched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for ``forward``.
        target: fraction of the dense cost to keep, in (0, 1]; met within 1 % from below where the widths allow.
        metric: ``"macs"``, ``"params"``, or ``"latency"``: measured here and now for the batch of ``example_inputs``,
            before and after compaction.
        method: one of ``lightning_prune.criteria.CRITERIA``.
        include: module names or regular expressions of the only layers to prune, see ``scope.protected_channels``.
        exclude: the same for layers to keep whole.
        prune_streams: also prune residual streams.
        ratios: ``{module name or regular expression: share of channels to keep}`` for single layers; the budget then
            governs the others.
        round_to: live widths are multiples of this.
        min_channels: at least so many channels stay in every group.
        remove_branches: whole residual branches may go when all their channels do; their layers vanish.
        reconstruct: refit the consumers of removed channels by least squares on ``data`` (He et al. 2017).
        recalibrate: re-estimate batch norm statistics of the masked network on so many batches of ``data`` (True: 8).
        data: a few batches of inputs, or of (inputs, labels), for ``reconstruct`` and ``recalibrate``.
        seed: for ``method="random"``.

    Raises:
        ValueError: an argument is out of range or misspelt.
        TraceError: the model fails on the example input or has nothing to prune.
        BudgetError: the target cannot be reached.
        CompactionError: the compact network would not equal the masked one.
    """
    check_fraction("target", target)
    check_choice("metric", metric, METRICS)
    check_choice("method", method, CRITERIA)
    check_positive("round_to", round_to)
    check_positive("min_channels", min_channels)
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    check_ratios(ratios)
    if reconstruct and data is None:
        raise ValueError("reconstruct=True needs data=, a few batches of inputs to fit on")
    check_recalibrate(recalibrate)
    if recalibrate and data is None:
        raise ValueError("recalibrate= needs data=, a few batches of inputs to take statistics of")
    data = list(data) if data is not None else []
    graph = trace_channels(model, example_inputs)
    values = saliency(method, model, graph, seed)
    eligible, kept = fix_ratios(graph, values, ratios)
    protected = protected_channels(graph, include, exclude, prune_streams) & eligible
    removable = removable_branches(model, example_inputs, graph) if remove_branches else None
    cost: Cost = (
        measure_latency_cost(model, example_inputs, graph)
        if metric == "latency"
        else CostModel(graph, metric)  # type: ignore[arg-type]
    )

    def choose(share: float) -> Mask:
        return select_channels(
            graph,
            values,
            cost,
            share,
            min_channels=min_channels,
            round_to=round_to,
            eligible=eligible,
            protected=protected | kept,
            removable=removable,
        )

    measured = metric == "latency"
    if measured:
        found = select_measured(model, example_inputs, graph, target, choose, values, round_to=round_to)
    mask = found.mask if measured else choose(target)
    plan = CompactionPlan.from_mask(graph, mask, remove_branches=remove_branches)
    if reconstruct:
        model, _ = refit_consumers(model, example_inputs, plan, data)
    if recalibrate:
        model = mask_channels(model, example_inputs, plan)
        retake_statistics(model, map(without_labels, data[: wanted_batches(recalibrate)]))
    dense, smaller = model, compact(model, example_inputs, plan)
    error = max_relative_error(mask_channels(model, example_inputs, plan), smaller, example_inputs)
    if measured:
        seconds = measured_seconds(dense, lambda: smaller, to_model(example_inputs, dense))
        budget = BudgetReport.measured(cost, mask, target, seconds)
    else:
        budget = BudgetReport.counted(graph, cost, mask, target, round_to)
    return PruneResult(smaller, plan, PruneReport.of(graph, plan, error, budget))
