"""From solved labels to a :class:`ChannelGraph`: classes become channels, alike channels become groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from .flow import Flow
from .groups import Axis, ChannelGraph, ChannelGroup, Member, OutputSlices, Role, Term
from .labels import Freeze, Labels, Vector

Key = tuple[str, int]  # tensor name and dimension


class _Classes:
    """Solved labels: root of every label, why roots are frozen, and the positions each root owns."""

    def __init__(self, flow: Flow, tensors: Mapping[str, Labels]) -> None:
        self.flow = flow
        self.tensors = tensors
        for name, labels in tensors.items():
            if name not in flow.touched:
                for vector in labels:
                    flow.space.freeze(vector, "not used by forward on the example input", "")
        self.root, self.frozen = flow.space.classes()
        self.producers = _union(flow.producers)
        self.consumers = _union(flow.consumers)
        producing = set(self.root[self.producers].tolist())
        consuming = set(self.root[_union([*flow.consumers, *flow.mixed])].tolist())
        self.slots: dict[int, dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
        for name, labels in tensors.items():
            for dim, vector in enumerate(labels):
                if vector is not None:
                    for index, r in enumerate(self.root[vector].tolist()):
                        self.slots[r][name, dim].append(index)
        for r in self.slots:
            if r not in producing:
                self.frozen.setdefault(
                    r, Freeze("no convolution or linear layer produces these channels", "")
                )
            elif r not in consuming:
                self.frozen.setdefault(r, Freeze("no convolution or linear layer reads these channels", ""))

    def role(self, name: str, dim: int) -> Role:
        vector = self.tensors[name][dim]
        assert vector is not None
        if np.isin(vector, self.producers).any():
            return "out"
        return "in" if np.isin(vector, self.consumers).any() else "vector"


def _union(vectors: list[Vector]) -> Vector:
    if not vectors:
        return np.empty(0, np.int64)
    merged = np.unique(np.concatenate(vectors))
    return merged[merged > 0]


def module_of(tensor: str) -> str:
    """Name of the module that owns a tensor; parametrized weights count as their module's."""
    owner = tensor.rpartition(".")[0]
    return owner.partition(".parametrizations")[0] if ".parametrizations" in f".{owner}" else owner or tensor


def build_graph(
    model: nn.Module, flow: Flow, tensors: Mapping[str, Labels], outputs: list[Any], batch: int
) -> ChannelGraph:
    """Group the removable classes of labels and express every size by them."""
    classes = _Classes(flow, tensors)
    order = _execution_order(flow, classes.root)
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for r, slots in classes.slots.items():
        if r not in classes.frozen:
            alike[tuple((key, len(index)) for key, index in sorted(slots.items()))].append(r)
    ungateable = {
        r
        for c in flow.contractions
        if c.inputs is not None and not c.gateable
        for r in classes.root[c.inputs[c.inputs > 0]].tolist()
    }

    groups: list[ChannelGroup] = []
    channel = np.full(flow.space.size, -1, np.int64)  # root -> channel id
    names: dict[str, int] = defaultdict(int)
    ordered = sorted(alike.items(), key=lambda item: min(order.get(r, len(order)) for r in item[1]))
    for signature, roots in ordered:
        if len(roots) < 2:
            classes.frozen.setdefault(roots[0], Freeze("a single channel, nothing would be left", ""))
            continue
        keys = [key for key, _ in signature]
        roles = {key: classes.role(*key) for key in keys}
        main = _first_producer(keys, roles, flow)
        roots.sort(key=lambda r: classes.slots[r][main])
        start = sum(g.size for g in groups)
        channel[roots] = np.arange(start, start + len(roots))
        members = tuple(
            Member(n, d, roles[n, d], np.array([classes.slots[r][n, d] for r in roots], np.int64))
            for n, d in keys
        )
        name = module_of(main[0])
        names[name] += 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        gateable = not ungateable.intersection(roots) and any(m.role == "in" for m in members)
        groups.append(ChannelGroup(unique, start, len(roots), members, gateable))

    ids = np.where(np.arange(flow.space.size) > 0, channel[classes.root], -1)
    return ChannelGraph(
        groups=tuple(groups),
        frozen=_frozen(classes),
        tensors={n: tuple(t.shape) for n, t in _named(model).items()},
        macs_terms=tuple(
            Term(c.module, c.coefficient / batch, tuple(_axis(ids, v) for v in c.axes))
            for c in flow.contractions
        ),
        params_terms=tuple(
            Term(n, *_parameter_axes(ids, tensors[n], tuple(p.shape))) for n, p in model.named_parameters()
        ),
        outputs=tuple(
            OutputSlices(name, tuple(None if v is None else _ids(ids, v) for v in labels))
            for name, labels in outputs
        ),
    )


def _named(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _ids(ids: Vector, vector: Vector) -> Vector:
    return np.where(vector > 0, ids[np.maximum(vector, 0)], -1)


def _axis(ids: Vector, vector: Vector) -> Axis:
    channels, counts = np.unique(_ids(ids, vector), return_counts=True)
    fixed = int(counts[channels < 0].sum())
    return Axis(fixed, channels[channels >= 0], counts[channels >= 0])


def _parameter_axes(ids: Vector, labels: Labels, shape: tuple[int, ...]) -> tuple[float, tuple[Axis, ...]]:
    coefficient = 1.0
    axes = []
    for vector, size in zip(labels, shape, strict=True):
        axis = None if vector is None else _axis(ids, vector)
        if axis is None or not len(axis.channels):
            coefficient *= size
        else:
            axes.append(axis)
    return coefficient, tuple(axes)


def _execution_order(flow: Flow, root: Vector) -> dict[int, int]:
    order: dict[int, int] = {}
    for vector in flow.producers:
        for r in root[vector[vector > 0]].tolist():
            order.setdefault(r, len(order))
    return order


def _first_producer(keys: list[Key], roles: Mapping[Key, Role], flow: Flow) -> Key:
    outs = [key for key in keys if roles[key] == "out"]
    for vector in flow.producers:
        for key in outs:
            own = flow.own_labels(key[0])[key[1]]
            if own is not None and np.isin(own, vector).any():
                return key
    return outs[0] if outs else keys[0]


def _frozen(classes: _Classes) -> dict[str, Freeze]:
    """The weight dimensions that some frozen class touches, with the reason of most of their channels."""
    result: dict[str, Freeze] = {}
    for name, labels in classes.tensors.items():
        for dim, vector in enumerate(labels):
            if vector is None or classes.role(name, dim) == "vector":
                continue
            reasons = [classes.frozen[r] for r in classes.root[vector].tolist() if r in classes.frozen]
            if reasons:
                result[f"{name}[{dim}]"] = max(set(reasons), key=reasons.count)
    return result
