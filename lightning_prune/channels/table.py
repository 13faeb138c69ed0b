"""The text of ``ChannelGraph.table()``: one line per group and per kind of reason, however large the network is."""

from __future__ import annotations

import numpy as np

from ..cost import CostModel, Metric
from .groups import ChannelGraph, ChannelGroup, Role

_NAMES = 4  # as many names per cell; the rest are counted


def graph_table(graph: ChannelGraph) -> str:
    """Groups, their sizes, what share of parameters and MACs goes with each; what is frozen, how much, and why."""
    shares = _shares(graph)
    rows: list[tuple[str, ...]] = [
        ("group", "channels", "params", "MACs", "written by", "read by", "along with")
    ]
    roles: tuple[Role, ...] = ("out", "in", "vector")
    for group in graph.groups:
        kind = " (stream)" if group.is_stream else ""
        params, macs = shares[group.name]
        cells = [_members(group, role) for role in roles]
        rows.append((group.name + kind, str(group.size), f"{params:.1%}", f"{macs:.1%}", *cells))
    lines = _aligned(rows)
    if graph.sizes:
        modules = list(dict.fromkeys(rule.module or "the network itself" for rule in graph.sizes))
        lines += ["", f"sizes spelled out in Python code, replaced when channels go: {_some(modules)}"]
    if graph.frozen:
        lines += ["", "frozen:", *_aligned(_frozen(graph))]
    return "\n".join(lines)


def _shares(graph: ChannelGraph) -> dict[str, tuple[float, float]]:
    """Share of parameters and MACs that would go with each whole group."""
    metrics: tuple[Metric, ...] = ("params", "macs")
    costs = [CostModel(graph, metric) for metric in metrics]
    result = {}
    for group in graph.groups:
        without = np.ones(graph.num_channels)
        without[group.ids] = 0
        params, macs = ((c.dense - c.cost(without)) / max(c.dense, 1.0) for c in costs)
        result[group.name] = (params, macs)
    return result


def _members(group: ChannelGroup, role: Role) -> str:
    names = [
        f"{m.tensor}[{m.dim}]" + (f" x{m.index.shape[1]}" if m.index.shape[1] > 1 else "")
        for m in group.by_role(role)
    ]
    if role == "vector":  # a norm's four vectors are one thing to a reader
        names = list(dict.fromkeys(m.tensor.rpartition(".")[0] or m.tensor for m in group.by_role(role)))
    return _some(names)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES])
    return f"{shown} and {len(names) - _NAMES} more" if len(names) > _NAMES else shown


def _frozen(graph: ChannelGraph) -> list[tuple[str, ...]]:
    """One row per reason and line of code, the largest share of parameters first."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, why in graph.frozen.items():
        found.setdefault(
            (why.reason, why.where.rpartition(", ")[2] if ".py:" in why.where else why.where), []
        ).append(name)
    total = max(
        sum(
            t.coefficient * float(np.prod([a.size(np.ones(graph.num_channels)) for a in t.axes]))
            for t in graph.params_terms
        ),
        1.0,
    )

    def share(names: list[str]) -> float:
        tensors = {name.rpartition("[")[0] for name in names}
        return sum(float(np.prod(graph.tensors[t])) for t in tensors) / total

    rows = [(share(names), reason, where, names) for (reason, where), names in found.items()]
    rows.sort(key=lambda row: -row[0])
    return [
        (f"  {part:.1%}", f"{reason} ({where})" if where else reason, _some(names))
        for part, reason, where, names in rows
    ]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
