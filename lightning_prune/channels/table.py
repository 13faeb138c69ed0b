"""The text of ``ChannelGraph.table()``."""

from __future__ import annotations

import numpy as np

from ..cost import CostModel, Metric
from .groups import ChannelGraph


def graph_table(graph: ChannelGraph) -> str:
    """Groups with their members and what each controls, then everything frozen and why."""
    ones = np.ones(graph.num_channels)
    shares = {}
    metrics: tuple[Metric, ...] = ("params", "macs")
    for metric in metrics:
        cost = CostModel(graph, metric)
        for group in graph.groups:
            without = ones.copy()
            without[group.ids] = 0
            shares[group.name, metric] = (cost.dense - cost.cost(without)) / max(cost.dense, 1.0)
    rows: list[tuple[str, ...]] = [("group", "channels", "params", "MACs", "members")]
    for group in graph.groups:
        members = ", ".join(
            f"{m.tensor}[{m.dim}]" + (f" x{m.index.shape[1]}" if m.index.shape[1] > 1 else "")
            for m in group.members
        )
        kind = " (stream)" if group.is_stream else ""
        rows.append(
            (
                group.name + kind,
                str(group.size),
                f"{shares[group.name, 'params']:.1%}",
                f"{shares[group.name, 'macs']:.1%}",
                members,
            )
        )
    lines = _aligned(rows)
    if graph.frozen:
        lines += ["", "frozen:", *_aligned([(f"  {name}", str(why)) for name, why in graph.frozen.items()])]
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
