"""The last word on a budget in latency: by measuring compact networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from .channels.groups import ChannelGraph, Mask
from .compaction import CompactionPlan, apply_plan
from .errors import BudgetError
from .inputs import ExampleInputs, to_model
from .latency import compare_latency
from .selection import block_to_add

#: a measured budget is met when the measured time is at most so much (relative) under it
LATENCY_TOLERANCE = 0.03
#: runs of a comparison, an odd number
_RUNS = 3
#: networks measured while the aim is corrected, and while single groups are widened
_ROUNDS, _TRIALS = 6, 12


@dataclass(frozen=True)
class MeasuredMask:
    """A mask whose compact network was measured to take ``share`` of the dense one's time; ``aim``: what was predicted."""

    mask: Mask
    share: float
    aim: float


def measured_seconds(
    dense: nn.Module, compact: Callable[[], nn.Module], inputs: ExampleInputs
) -> tuple[float, float]:
    """Median seconds of a call of each, the two taking turns; of several such runs the one with the median ratio.

    ``compact`` makes the network: anew for every run, where its place in memory (which can decide over tens of percent)
    is not settled yet.
    """
    runs = []
    for _ in range(_RUNS):
        models = {"dense": dense, "compact": compact()}
        times = compare_latency(models, inputs, repeats=10, min_seconds=0.15)
        runs.append((times["dense"].median, times["compact"].median))
    return sorted(runs, key=lambda run: run[1] / run[0])[_RUNS // 2]


def select_measured(
    model: nn.Module,
    example_inputs: ExampleInputs,
    graph: ChannelGraph,
    target: float,
    choose: Callable[[float], Mask],
    saliency: npt.NDArray[np.float64],
    *,
    tolerance: float = LATENCY_TOLERANCE,
    round_to: int = 1,
) -> MeasuredMask:
    """Choose channels so that the compact network, *as measured*, takes at most ``target`` of the dense one's time.

    ``choose(aim)`` selects for a predicted share; prediction and measurement differ, so the aim is corrected by what is
    measured (dense and compact in turn, in one run), until the measured share is within ``tolerance`` under the target:
    in proportion at first, by interpolation (regula falsi) once one aim was too high and one too low.

    Time is a staircase in the widths: kernels compute 48 channels in the time of 33. Where a step of the staircase lies
    across the target, single groups of the closest network under it are widened by their most salient channels
    (``saliency``, shape [num_channels]), by an eighth of the group, a sixteenth, ..., as long as the clock allows.

    Returns:
        The closest one from below; if none was, the fastest.
    """
    inputs = to_model(example_inputs, model)
    low, middle = target * (1 - tolerance), target * (1 - tolerance / 2)

    def measure(mask: Mask, aim: float) -> MeasuredMask:
        plan = CompactionPlan.from_mask(graph, mask, remove_branches=True)
        dense, compact = measured_seconds(model, lambda: apply_plan(model, plan), inputs)
        return MeasuredMask(mask, compact / dense, aim)

    aim, tried = target, list[MeasuredMask]()
    for _ in range(_ROUNDS):
        try:
            mask = choose(min(aim, 1.0))
        except BudgetError:
            if not tried:
                raise
            break
        if any(np.array_equal(mask, entry.mask) for entry in tried):  # the widths allow nothing in between
            break
        tried.append(measure(mask, aim))
        if low <= tried[-1].share <= target:
            return tried[-1]
        aim = _next_aim(tried, middle)
    under = [entry for entry in tried if entry.share <= target]
    if not under:
        return min(tried, key=lambda e: e.share)
    best, trials = max(under, key=lambda e: e.share), _TRIALS
    eligible = choose(1.0)
    for group in sorted(graph.groups, key=lambda g: -_next_saliency(saliency, best.mask, eligible, g.ids)):
        width = max(group.size // 8, 1)
        while width >= 1 and trials > 0 and best.share < low:
            wider = best.mask.copy()
            for _ in range(-(-width // round_to)):
                wider[block_to_add(group, saliency, wider, round_to, eligible)] = True
            if np.array_equal(wider, best.mask):
                break
            trials -= 1
            found = measure(wider, best.aim)
            if found.share <= target:
                best = max(best, found, key=lambda e: e.share)
            if found is not best:
                width = width // 2 if width > round_to else 0
    return best


def _next_saliency(saliency: npt.NDArray[np.float64], mask: Mask, eligible: Mask, ids: slice) -> float:
    """Of the best channel that is left out."""
    left = saliency[ids][~mask[ids] & eligible[ids]]
    return float(left.max()) if len(left) else -np.inf


def _next_aim(tried: list[MeasuredMask], middle: float) -> float:
    low = max((e for e in tried if e.share <= middle), key=lambda e: e.aim, default=None)
    high = min((e for e in tried if e.share > middle), key=lambda e: e.aim, default=None)
    if low is None or high is None or not low.aim < high.aim:
        last = tried[-1]
        return float(np.clip(last.aim * middle / last.share, 0.01, 1.0))
    part = (middle - low.share) / (high.share - low.share)
    return low.aim + float(np.clip(part, 0.1, 0.9)) * (high.aim - low.aim)
