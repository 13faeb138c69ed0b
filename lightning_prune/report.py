"""Tables for people and JSON for programs, from the same numbers."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .files import write_atomically

#: networks that are compared, by key, and how tables call them; those made by ``optimize_for_inference`` may be missing
VARIANTS = {
    "dense": "dense",
    "dense_optimized": "dense optimized",
    "masked": "masked",
    "compact": "compact",
    "optimized": "compact + kernels",
}


def to_text(table: Table, width: int = 120) -> str:
    """A rich table as plain text without colours, at most ``width`` characters wide."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON atomically: readers see the old file or the whole new one, never a part.

    Args:
        path: target; missing parent folders are made.
        value: what ``json`` can write; NaN and infinity are refused, since JSON has neither.

    Returns:
        The path.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value that JSON cannot hold.
    """
    return write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def human(number: float) -> str:
    """A count with three significant digits and a unit: 1234567 -> "1.23 M"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.3g}"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value).

    Raises:
        ValueError: ``values`` is empty.
    """
    if not values:
        raise ValueError("at least one value is needed, got none")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def comparison_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """Dense, masked, compact and optimised networks side by side.

    Args:
        title: of the table.
        metrics: per variant "accuracy_per_seed", "params", "macs" and "latency_ms" (batch size as text ->
            milliseconds), as :mod:`lightning_prune.demo` writes them.

    Returns:
        A rich table, one column per variant; where counts differ from the dense network's with the share that is
        left, latencies with the speed-up.
    """
    dense = metrics["dense"]

    def count(variant: str, key: str) -> str:
        value = metrics[variant][key]
        return human(value) + ("" if value == dense[key] else f" ({100 * value / dense[key]:.0f} %)")

    def latency(variant: str, batch: str) -> str:
        value = metrics[variant]["latency_ms"][batch]
        return f"{value:.3f} ms" + (
            "" if variant == "dense" else f" ({dense['latency_ms'][batch] / value:.2f}x)"
        )

    def accuracy(variant: str) -> str:
        mean, spread = mean_and_spread(metrics[variant]["accuracy_per_seed"])
        return f"{100 * mean:.2f} ± {100 * spread:.2f}"

    variants = [variant for variant in VARIANTS if variant in metrics]
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for variant in variants:  # on a narrow terminal cells wrap
        table.add_column(VARIANTS[variant], justify="right")
    table.add_row("accuracy, %", *(accuracy(v) for v in variants))
    table.add_row("parameters", *(count(v, "params") for v in variants))
    table.add_row("MACs", *(count(v, "macs") for v in variants))
    for batch in sorted(dense["latency_ms"], key=int):
        table.add_row(f"latency, batch {batch}", *(latency(v, batch) for v in variants))
    return table


def widths_table(title: str, widths: Mapping[str, Sequence[int]]) -> Table:
    """Live channels per group.

    Args:
        title: of the table.
        widths: group -> (live, size).
    """
    table = Table(title=title)
    table.add_column("group")
    table.add_column("live", justify="right")
    table.add_column("of", justify="right")
    table.add_column("")
    for group, (live, size) in widths.items():
        table.add_row(group, str(live), str(size), "█" * max(1, round(20 * live / size)) if live else "")
    return table
