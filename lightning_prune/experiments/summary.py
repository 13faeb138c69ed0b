"""Means, Student intervals and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .trials import Trial, TrialResult

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean of ``n`` values and the half width of its Student t interval (95 %); infinite for a single value."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; an infinite width becomes null."""
        data = asdict(self)
        data["half_width"] = self.half_width if math.isfinite(self.half_width) else None
        return data

    def percent(self, digits: int = 1) -> str:
        """As text, for values that are shares: ``92.5 ± 0.4``."""
        width = f" ± {100 * self.half_width:.{digits}f}" if math.isfinite(self.half_width) else ""
        return f"{100 * self.mean:.{digits}f}{width}"


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and interval: ``t(0.975, n - 1) * s / sqrt(n)`` on either side.

    Raises:
        ValueError: no values.
    """
    from scipy import stats

    numbers = list(values)
    if not numbers:
        raise ValueError("at least one value is needed, got none")
    n = len(numbers)
    if n == 1:
        return Estimate(numbers[0], math.inf, 1)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Estimate(statistics.fmean(numbers), quantile * statistics.stdev(numbers) / math.sqrt(n), n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """``first - second`` over the seeds that both have (a paired t interval); None if there are none."""
    seeds = sorted(set(first) & set(second))
    return estimate([first[s] - second[s] for s in seeds]) if seeds else None


@dataclass(frozen=True)
class Row:
    """One method at one budget, over its seeds."""

    network: str
    method: str
    target: float
    loss_scale: float
    accuracy: Estimate
    macs_share: Estimate
    params_share: Estimate
    seconds: Estimate
    epochs: float
    reached: Estimate | None
    accuracies: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        data = asdict(self)
        for name in ("accuracy", "macs_share", "params_share", "seconds", "reached"):
            value = getattr(self, name)
            data[name] = value.to_json() if value is not None else None
        return data


def summarise(results: Mapping[Trial, TrialResult], trials: Sequence[Trial]) -> list[Row]:
    """One row per network, budget, method and loss scale, in the order of ``trials``; missing results are left out."""
    groups: dict[tuple[str, float, str, float], list[TrialResult]] = {}
    for trial in trials:
        if trial in results:
            key = (trial.network, trial.target, trial.method, trial.loss_scale)
            groups.setdefault(key, []).append(results[trial])
    rows = []
    for (network, target, method, scale), found in groups.items():
        reached = [r.reached for r in found if r.reached is not None]
        rows.append(
            Row(
                network,
                method,
                target,
                scale,
                accuracy=estimate(r.accuracy for r in found),
                macs_share=estimate(r.macs_share for r in found),
                params_share=estimate(r.params_share for r in found),
                seconds=estimate(r.seconds for r in found),
                epochs=statistics.fmean(r.epochs for r in found),
                reached=estimate(reached) if reached else None,
                accuracies={r.trial.seed: r.accuracy for r in found},
            )
        )
    return rows
