"""Tables, pictures and JSON of an experiment."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from ..plots import new_figure, save_figure
from ..processor import this_processor
from .summary import Row
from .trials import DEFAULT_METHOD, FROM_SCRATCH, Setting, Trial, TrialResult

#: how tables call methods whose names do not say enough
LABELS = {
    "magnitude_one_shot": "magnitude, one-shot",
    "from_scratch": "from scratch, equal epochs",
    "from_scratch_compute": "from scratch, equal compute",
    "first_k": "first k",
    "group_norm": "Torch-Pruning GroupNorm",
}

#: without the red and the greys of the default method and the baselines
_COLOURS = (
    "tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
    "navy", "gold", "limegreen", "orchid", "peru", "teal", "slateblue", "yellowgreen",
)  # fmt: skip


def shown_network(row: Row, settings: Mapping[str, Setting]) -> str:
    """The network under which a row is shown."""
    setting = settings[row.network]
    return setting.shown_as or setting.name


def label(row: Row, settings: Mapping[str, Setting]) -> str:
    """What a row is called in tables and legends."""
    text = LABELS.get(row.method, row.method)
    return f"{text} (batch norm)" if settings[row.network].shown_as else text


def by_method(rows: Sequence[Row], network: str, settings: Mapping[str, Setting]) -> dict[str, list[Row]]:
    """Rows of a network at loss scale 1, per label, largest target first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if shown_network(row, settings) == network and row.loss_scale == 1:
            found.setdefault(label(row, settings), []).append(row)
    return {name: sorted(each, key=lambda r: -r.target) for name, each in found.items()}


def networks(rows: Sequence[Row], settings: Mapping[str, Setting]) -> list[str]:
    """Networks that tables and plots show, in order."""
    return list(dict.fromkeys(shown_network(row, settings) for row in rows))


def accuracy_table(rows: Sequence[Row], network: str, settings: Mapping[str, Setting]) -> Table:
    """Accuracy (mean ± 95 % interval) per method and budget, for the terminal."""
    methods = by_method(rows, network, settings)
    targets = sorted(
        {r.target for each in methods.values() for r in each if r.method != "dense"}, reverse=True
    )
    seeds = max((r.accuracy.n for each in methods.values() for r in each), default=0)
    metric = "MACs" if settings[network].metric == "macs" else "weights"
    table = Table(title=f"{network}: accuracy in %, mean ± 95 % interval over {seeds} seeds")
    table.add_column("method", no_wrap=True)
    for target in targets:
        table.add_column(f"{1 - target:.0%} of {metric} removed", justify="right")
    for name, each in methods.items():
        cells = {r.target: r.accuracy.percent() for r in each}
        if "dense" in {r.method for r in each}:
            table.add_row(f"{name}: {cells[1.0]}", end_section=True)
        else:
            table.add_row(name, *(cells.get(t, "") for t in targets))
    return table


def plot_accuracy(
    rows: Sequence[Row],
    settings: Mapping[str, Setting],
    path: str | os.PathLike[str],
    *,
    metrics: Sequence[str] = ("macs",),
) -> Path:
    """Accuracy against the share removed, with 95 % intervals: a panel per network and metric.

    Args:
        rows: of the experiment.
        settings: by name.
        path: PNG file to write.
        metrics: "macs" and "params": what the horizontal axes count.
    """
    names = networks(rows, settings)
    figure = new_figure(6.4 * len(names) * len(metrics), 5.2)
    axes = figure.subplots(1, len(names) * len(metrics), squeeze=False)[0]
    panels = [(network, metric) for network in names for metric in metrics]
    styles: dict[str, dict[str, Any]] = {}
    for axis, (network, metric) in zip(axes, panels, strict=True):
        methods = by_method(rows, network, settings)
        shown = [name for name, each in methods.items() if each[0].method != "dense"]
        for index, name in enumerate(shown):
            each = methods[name]
            style = styles.setdefault(name, _style(each[0], len(styles)))
            shares = [r.macs_share if metric == "macs" else r.params_share for r in each]
            # side by side, or the intervals of ten methods at one budget cover each other
            shift = 0.4 * (index - (len(shown) - 1) / 2)
            x = [100 * (1 - s.mean) + shift for s in shares]
            y = [100 * r.accuracy.mean for r in each]
            error = [
                100 * r.accuracy.half_width if math.isfinite(r.accuracy.half_width) else 0.0 for r in each
            ]
            axis.errorbar(x, y, yerr=error, label=name, capsize=2, elinewidth=0.8, markersize=4, **style)
        for name, each in methods.items():
            if each[0].method == "dense":
                mean, half = 100 * each[0].accuracy.mean, 100 * each[0].accuracy.half_width
                colour = "0.6" if settings[each[0].network].shown_as else "black"
                axis.axhline(mean, color=colour, linewidth=1, linestyle=":", label=f"{name} {mean:.1f} %")
                if math.isfinite(half):
                    axis.axhspan(mean - half, mean + half, color=colour, alpha=0.08, linewidth=0)
        what = "MACs" if metric == "macs" else "weights"
        axis.set_xlabel(f"{what} removed, % (methods of one budget drawn side by side)", fontsize=9)
        axis.set_ylabel("test accuracy, %")
        axis.set_title(network)
        axis.grid(alpha=0.25)
        bottom, top = axis.get_ylim()
        axis.set_ylim(max(bottom, 0.0), min(top, 100.0))
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    axes[0].legend(handles.values(), handles.keys(), fontsize=7, loc="lower left") if len(
        axes
    ) == 1 else figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right center")
    return save_figure(figure, path)


def _style(row: Row, index: int) -> dict[str, Any]:
    if row.method == DEFAULT_METHOD:
        return {"color": "crimson", "linewidth": 2.2, "marker": "o", "zorder": 3}
    if row.method in FROM_SCRATCH:
        return {"color": "0.35" if row.method == "from_scratch" else "0.6", "linestyle": "--", "marker": "s"}
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linewidth": 1.1,
        "marker": "ovD^<>Pp*hX"[index % 11],
    }


def environment(*packages: str) -> dict[str, str]:
    """Machine and versions, for the JSON file."""
    found = {"python": platform.python_version(), "cpu": this_processor(), "cpus": str(os.cpu_count())}
    for package in ("torch", "lightning", "lightning-prune", "optuna", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # noqa: PERF203
            found[package] = "absent"
    return found


def document(
    rows: Sequence[Row],
    results: Mapping[Trial, TrialResult],
    trials: Sequence[Trial],
    failed: Mapping[Trial, str],
    settings: Mapping[str, Setting],
    *packages: str,
) -> dict[str, Any]:
    """Everything as JSON data: settings, environment, every trial, the summary, what failed and what is missing."""
    return {
        "environment": environment(*packages),
        "settings": [setting.identity() for setting in settings.values()],
        "summary": [row.to_json() for row in rows],
        "trials": [results[t].to_json(with_plan=False) for t in trials if t in results],
        "failed": {str(t): message for t, message in failed.items()},
        "missing": [str(t) for t in trials if t not in results and t not in failed],
    }
