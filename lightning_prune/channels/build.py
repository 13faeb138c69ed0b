"""From solved labels to a :class:`ChannelGraph`: classes become channels, alike channels become groups."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from .calls import INDEXED, SHAPED
from .flow import Flow
from .groups import Axis, ChannelGraph, ChannelGroup, Member, OutputSlices, Role, SizeRule, Term
from .labels import FIXED, Freeze, Labels, Vector

Key = tuple[str, int]  # tensor name and dimension
_LATE = np.iinfo(np.int64).max


class _Classes:
    """Solved labels: root of every label, why roots are frozen, and the tensor positions that each root owns.

    ``keys`` lists the labelled tensor dimensions. ``owner``, ``key`` and ``index`` are parallel: root, number of the
    key and position along it, sorted by all three; the entries of root ``r`` are ``first[r] : first[r + 1]``.
    """

    def __init__(self, flow: Flow, tensors: Mapping[str, Labels]) -> None:
        space = flow.space
        for name, labels in tensors.items():
            if name not in flow.touched:
                for vector in labels:
                    space.freeze(vector, "not used by forward on the example input", "")
        self.tensors = tensors
        self.root, self.frozen = space.solve()
        self.summed = space.summed()
        self.reasons = list(space.freezes)
        self.produced = _first_seen(flow.producers, space.size)
        self.consumed = _first_seen(flow.consumers, space.size) < _LATE
        mixed = self.consumed | (_first_seen(flow.mixed, space.size) < _LATE)

        self.keys = [(n, d) for n, labels in tensors.items() for d, v in enumerate(labels) if v is not None]
        vectors = [self.own(key) for key in self.keys]
        labels_ = np.concatenate(vectors) if vectors else np.empty(0, np.int64)
        key = np.repeat(np.arange(len(vectors)), [len(v) for v in vectors]).astype(np.int64)
        index = np.concatenate([np.arange(len(v)) for v in vectors]) if vectors else labels_
        owner = self.root[labels_]
        order = np.lexsort((index, key, owner))
        self.owner, self.key, self.index = owner[order], key[order], index[order]
        self.first = np.searchsorted(self.owner, np.arange(space.size + 1))

        for flags, reason in (
            (self.produced < _LATE, "no convolution or linear layer produces these channels"),
            (mixed, "no convolution or linear layer reads these channels"),
        ):
            reached = np.zeros(space.size, bool)
            reached[self.root[flags]] = True
            self.frozen = np.where((self.frozen < 0) & ~reached, len(self.reasons), self.frozen)
            self.reasons.append(Freeze(reason, ""))

    def own(self, key: Key) -> Vector:
        vector = self.tensors[key[0]][key[1]]
        assert vector is not None
        return vector

    def role(self, key: Key) -> Role:
        vector = self.own(key)
        if (self.produced[vector] < _LATE).any():
            return "out"
        return "in" if self.consumed[vector].any() else "vector"

    def alike(self) -> list[list[int]]:
        """Removable roots, those with the same number of positions in the same tensor dimensions together."""
        found: dict[bytes, list[int]] = defaultdict(list)
        for r in np.unique(self.owner).tolist():
            if self.frozen[r] < 0:
                found[self.key[self.first[r] : self.first[r + 1]].tobytes()].append(r)
        return list(found.values())

    def freeze(self, r: int, reason: str) -> None:
        self.frozen[r] = len(self.reasons)
        self.reasons.append(Freeze(reason, ""))


def _first_seen(vectors: Sequence[Vector], size: int) -> Vector:
    """For each label the number of the first vector that holds it (a huge number: none)."""
    seen = np.full(size, _LATE, np.int64)
    for i in range(len(vectors) - 1, -1, -1):
        seen[vectors[i]] = i
    seen[FIXED] = _LATE
    return seen


def module_of(tensor: str) -> str:
    """Name of the module that owns a tensor; parametrized weights count as their module's."""
    owner = tensor.rpartition(".")[0]
    return owner.partition(".parametrizations")[0] if ".parametrizations" in f".{owner}" else owner or tensor


def build_graph(
    model: nn.Module, flow: Flow, tensors: Mapping[str, Labels], outputs: list[Any], batch: int
) -> ChannelGraph:
    """Group the removable classes of labels and express every size by them."""
    classes = _Classes(flow, tensors)
    roles = {key: classes.role(key) for key in classes.keys}
    born = np.full(flow.space.size, _LATE, np.int64)  # per root: when it is first produced
    np.minimum.at(born, classes.root, classes.produced)
    gateless = np.zeros(flow.space.size, bool)
    for c in flow.contractions:
        if c.inputs is not None and not c.gateable:
            gateless[classes.root[c.inputs]] = True

    groups: list[ChannelGroup] = []
    channel = np.full(flow.space.size, -1, np.int64)  # root -> channel id
    names: dict[str, int] = defaultdict(int)
    for roots in sorted(classes.alike(), key=lambda group: int(born[group].min())):
        if len(roots) < 2:
            classes.freeze(roots[0], "a single channel, nothing would be left")
            continue
        group = _members(classes, roots, roles)
        main = _first_producer(classes, group, roles)
        order = np.lexsort(group[main].T[::-1])
        start = sum(g.size for g in groups)
        channel[np.array(roots)[order]] = np.arange(start, start + len(roots))
        members = tuple(Member(*key, roles[key], index[order]) for key, index in group.items())
        name = module_of(main[0])
        names[name] += 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        gateable = not gateless[roots].any() and any(m.role == "in" for m in members)
        stream = _is_stream(classes, group, roles)
        groups.append(ChannelGroup(unique, start, len(roots), members, gateable, stream))

    ids = channel[classes.root]
    ids[FIXED] = -1
    return ChannelGraph(
        groups=tuple(groups),
        frozen=_frozen(classes, roles),
        tensors={n: tuple(t.shape) for n, t in _named(model).items()},
        macs_terms=tuple(
            Term(c.module, c.coefficient / batch, tuple(_axis(ids, v) for v in c.axes))
            for c in flow.contractions
        ),
        params_terms=tuple(
            Term(n, *_parameter_axes(ids, tensors[n], tuple(p.shape))) for n, p in model.named_parameters()
        ),
        outputs=tuple(
            OutputSlices(name, tuple(None if v is None else ids[v] for v in labels))
            for name, labels in outputs
        ),
        sizes=_size_rules(flow, ids),
    )


def _members(classes: _Classes, roots: list[int], roles: Mapping[Key, Role]) -> dict[Key, Vector]:
    """Positions ``[len(roots), k]`` of roots that are alike, by tensor dimension."""
    starts = classes.first[roots]
    width = int(classes.first[roots[0] + 1] - starts[0])
    rows = classes.index[starts[:, None] + np.arange(width)]
    keys = classes.key[starts[0] : starts[0] + width]
    cuts = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), width]
    found = {classes.keys[keys[a]]: rows[:, a:b] for a, b in itertools.pairwise(cuts)}
    return dict(sorted(found.items()))


def _first_producer(classes: _Classes, group: Mapping[Key, Vector], roles: Mapping[Key, Role]) -> Key:
    def produced(key: Key) -> int:
        return int(classes.produced[classes.own(key)[group[key].ravel()]].min())

    return min((key for key in group if roles[key] == "out"), key=produced, default=next(iter(group)))


def _is_stream(classes: _Classes, group: Mapping[Key, Vector], roles: Mapping[Key, Role]) -> bool:
    """Do two producers write into one channel by being added? All channels of a group are alike: the first one tells."""
    owned = [set(classes.summed[classes.own(key)[group[key][0]]]) for key in group if roles[key] == "out"]
    return any(not a.isdisjoint(b) for a, b in itertools.combinations(owned, 2))


def _size_rules(flow: Flow, ids: Vector) -> tuple[SizeRule, ...]:
    rules: dict[tuple[str, str, int], SizeRule] = {}
    for i in sorted(flow.hard):
        call = flow.calls[i]
        sizes = tuple((slot, _axis(ids, vector)) for slot, vector in call.slots)
        if call.function in SHAPED | INDEXED:  # batch and spatial sizes are not ours to fix
            wrong = {slot.partition(".")[0] for slot in flow.hard[i]}
            sizes = tuple((slot, axis) for slot, axis in sizes if slot.partition(".")[0] in wrong)
        key = (call.module, call.function, call.ordinal)
        rules.setdefault(key, SizeRule(*key, sizes))
    return tuple(rules.values())


def _named(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _axis(ids: Vector, vector: Vector) -> Axis:
    own = ids[vector]
    counts = np.bincount(own[own >= 0])
    channels = np.flatnonzero(counts)
    return Axis(int((own < 0).sum()), channels, counts[channels])


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


def _frozen(classes: _Classes, roles: Mapping[Key, Role]) -> dict[str, Freeze]:
    """The weight dimensions that some frozen class touches, with the reason of most of their channels."""
    result: dict[str, Freeze] = {}
    for key in classes.keys:
        if roles[key] != "vector":
            why = classes.frozen[classes.root[classes.own(key)]]
            why = why[why >= 0]
            if len(why):
                result[f"{key[0]}[{key[1]}]"] = classes.reasons[int(np.bincount(why).argmax())]
    return result
