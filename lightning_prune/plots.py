"""Pictures for the demonstration: samples of a data set, mask values over the epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import TensorPairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display and leaves matplotlib's global state alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib, which is not installed; pip install 'lightning-prune[demo]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG file; missing folders are made. Returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)
    return target


def plot_samples(
    data: TensorPairs, path: str | os.PathLike[str], *, title: str = "", columns: int = 8
) -> Path:
    """Draw the first samples of a data set with their labels in two rows.

    Args:
        data: inputs in [-1, 1] of shape (n, 1 or 3, h, w) and labels (n,).
        path: PNG file to write; missing folders are made.
        title: above the picture.
        columns: samples per row.

    Returns:
        The path.
    """
    figure = new_figure(1.2 * columns, 3.0)
    axes = figure.subplots(2, columns)
    figure.suptitle(title)
    for axis, image, label in zip(axes.flat, data.inputs, data.labels, strict=False):
        axis.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r")
        axis.set_title(str(int(label)), fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    return save_figure(figure, path)


def plot_gates(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Draw every mask value over the epochs, one panel per group, and the number of live channels.

    Args:
        history: records of :class:`~lightning_prune.ChannelPruning` with "epoch" and "gates" (group -> values);
            records without gates (warmup) are skipped.
        path: PNG file to write; missing folders are made.
        title: above the picture.

    Returns:
        The path.

    Raises:
        ValueError: no record has gates.
    """
    records = [record for record in history if record.get("gates")]
    if not records:
        raise ValueError(f"no record of the history has gates (records: {len(history)}); nothing to draw")
    groups = list(records[0]["gates"])
    figure = new_figure(3.0 * len(groups), 3.0)
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    figure.suptitle(title)
    epochs = [int(record["epoch"]) for record in records]
    for axis, group in zip(axes, groups, strict=True):
        values = [[float(v) for v in record["gates"][group]] for record in records]
        axis.plot(epochs, values, linewidth=0.7, marker="." if len(epochs) == 1 else None)
        live = sum(value != 0 for value in values[-1])
        axis.set_title(f"{group}: {live} of {len(values[-1])} live", fontsize=9)
        axis.set_xlabel("epoch")
    axes[0].set_ylabel("mask value")
    return save_figure(figure, path)
