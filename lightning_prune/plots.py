"""Pictures for the demonstration: samples of a data set, mask values over the epochs, filters before and after."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .data import TensorPairs
from .outcome import FirstFilters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def plot_filters(
    filters: FirstFilters, path: str | os.PathLike[str], *, title: str = "", columns: int = 8
) -> Path:
    """Draw the filters of the first convolution before and after the fit, each at the same place in both halves.

    One scale of colours for both halves, red positive, blue negative, white zero; three input channels are drawn as
    colours around mid-grey, other numbers as their mean. Where a filter was removed, the left half shows it pale with a
    grey cross, and the right half a grey field with a cross.

    Args:
        filters: of :class:`~lightning_prune.ChannelPruning`, with weights of shape [filters, channels, height, width].
        path: PNG file to write; missing folders are made.
        title: above the picture.
        columns: filters per row and half.

    Returns:
        The path.

    Raises:
        ValueError: the filters are not two-dimensional.
    """
    if filters.before.dim() != 4:
        raise ValueError(
            f"filters of a 2-d convolution are needed, [filters, channels, height, width]; got {tuple(filters.before.shape)}"
        )
    count = len(filters.before)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(0.62 * (2 * columns + 1), 0.62 * rows + 0.9)
    figure.suptitle(title)
    live = int(filters.live.sum())
    halves = figure.subfigures(1, 2, wspace=0.04, squeeze=False)[0]
    limit = float(max(filters.before.abs().max(), filters.after.abs().max())) or 1.0
    for half, weights, name in (
        (halves[0], filters.before, f"before: {count} filters"),
        (halves[1], filters.after, f"after: {live} of {count} left"),
    ):
        half.suptitle(name, fontsize=10)
        axes = half.subplots(rows, columns, squeeze=False).flat
        for axis in axes:
            axis.axis("off")
        for i in range(count):
            axis, gone = axes[i], not bool(filters.live[i])
            height, width = weights.shape[2:]
            if gone and weights is filters.after:
                axis.imshow([[0.8]], cmap="gray", vmin=0, vmax=1, extent=(0, width, 0, height))
            else:
                _draw_filter(axis, weights[i], limit, alpha=0.35 if gone else 1.0)
            if gone:
                for ends in ((0, height), (height, 0)):
                    axis.plot((0, width), ends, color="0.45", linewidth=1.2)
            axis.set(xlim=(0, width), ylim=(0, height))
            axis.set_title(str(i), fontsize=6, pad=1.5, color="0.55" if gone else "black")
            axis.axis("on")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color="0.7" if gone else "black", linewidth=0.8)
    return save_figure(figure, path)


def _draw_filter(axis: Axes, weight: Tensor, limit: float, alpha: float) -> None:
    """One filter, [channels, height, width]."""
    height, width = weight.shape[1:]
    extent = (0, width, 0, height)
    if len(weight) == 3:
        picture = (0.5 + 0.5 * weight / limit).clamp(0, 1).permute(1, 2, 0)
        axis.imshow(picture.numpy(), alpha=alpha, extent=extent)
    else:
        picture = weight.mean(dim=0)
        axis.imshow(picture.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=alpha, extent=extent)
