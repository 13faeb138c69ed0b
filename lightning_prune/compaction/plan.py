"""The compaction plan: which channels of which groups go, and which positions of which tensors that means."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..channels.groups import ChannelGraph, Mask
from ..errors import PlanError
from ..files import write_atomically
from .sizes import SizeFix

FORMAT = "lightning-prune/compaction-plan"
VERSION = 1


@dataclass(frozen=True)
class GroupRemoval:
    """Channels removed from one group: ``size`` before, ``removed`` sorted indices within the group."""

    size: int
    removed: tuple[int, ...]


@dataclass(frozen=True)
class TensorSlice:
    """Positions removed along one dimension of one parameter or buffer of dense size ``size``."""

    tensor: str
    dim: int
    size: int
    removed: tuple[int, ...]


@dataclass(frozen=True)
class CompactionPlan:
    """Everything needed to shrink a fresh copy of the same network, without tracing it again.

    Attributes:
        groups: per channel group, its size and the removed channels.
        slices: per tensor and dimension, the removed positions.
        tensors: dense shape of every parameter and buffer, to recognise a foreign model.
        sizes: sizes to put in place of those that Python code spells out.
    """

    groups: Mapping[str, GroupRemoval]
    slices: tuple[TensorSlice, ...]
    tensors: Mapping[str, tuple[int, ...]]
    sizes: tuple[SizeFix, ...] = ()

    @classmethod
    def from_mask(cls, graph: ChannelGraph, mask: Mask, *, remove_branches: bool = False) -> CompactionPlan:
        """Plan that removes the channels where ``mask`` (bool, shape [graph.num_channels]) is False.

        Raises:
            PlanError: a group would lose all channels and ``remove_branches`` is not set.
        """
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != (graph.num_channels,):
            raise PlanError(f"mask must have shape ({graph.num_channels},), got {mask.shape}")
        groups: dict[str, GroupRemoval] = {}
        gone: dict[tuple[str, int], list[np.ndarray]] = {}
        for group in graph.groups:
            dead = np.flatnonzero(~mask[group.ids])
            if len(dead) == group.size and not remove_branches:
                raise PlanError(
                    f"all {group.size} channels of group {group.name!r} would be removed; keep at least one"
                )
            groups[group.name] = GroupRemoval(group.size, tuple(int(i) for i in dead))
            for member in group.members:
                gone.setdefault((member.tensor, member.dim), []).append(member.index[dead].ravel())
        slices = []
        for (tensor, dim), parts in gone.items():
            positions = np.unique(np.concatenate(parts))
            if len(positions):
                slices.append(TensorSlice(tensor, dim, graph.tensors[tensor][dim], tuple(positions.tolist())))
        live = mask.astype(np.float64)
        sizes = tuple(
            SizeFix(
                r.module, r.function, r.ordinal, tuple((slot, int(axis.size(live))) for slot, axis in r.sizes)
            )
            for r in graph.sizes
        )
        return cls(groups, tuple(slices), dict(graph.tensors), sizes)

    @property
    def removed(self) -> dict[str, list[int]]:
        """Removed channel indices per group (groups that keep all channels are listed with an empty list)."""
        return {name: list(g.removed) for name, g in self.groups.items()}

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """``{group: (live channels, dense channels)}``."""
        return {name: (g.size - len(g.removed), g.size) for name, g in self.groups.items()}

    def mask(self, graph: ChannelGraph) -> Mask:
        """The plan as a flat mask over the channels of ``graph``.

        Raises:
            PlanError: the groups of ``graph`` are not those the plan was made for.
        """
        mask = np.ones(graph.num_channels, dtype=bool)
        sizes = {g.name: g.size for g in graph.groups}
        for name, removal in self.groups.items():
            if sizes.get(name) != removal.size:
                found = (
                    f"{sizes[name]} channels"
                    if name in sizes
                    else f"no such group among {', '.join(sizes) or 'none'}"
                )
                raise PlanError(
                    f"the plan prunes group {name!r} of {removal.size} channels, the model has {found}"
                )
            mask[graph[name].start + np.array(removal.removed, np.int64)] = False
        return mask

    def check_model(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Raise :class:`PlanError` unless ``tensors`` (name -> shape) are those of the dense model of this plan."""
        for name, shape in self.tensors.items():
            if name not in tensors:
                raise PlanError(
                    f"the plan was made for a model with a tensor {name!r}, which this model does not have"
                )
            if tuple(tensors[name]) != tuple(shape):
                raise PlanError(
                    f"the plan was made for {name!r} of shape {tuple(shape)}, this model has {tuple(tensors[name])}; "
                    "pass the dense model the plan was made for"
                )
        extra = sorted(set(tensors) - set(self.tensors))
        if extra:
            raise PlanError(f"this model has tensors the plan does not know: {', '.join(extra[:5])}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "groups": {n: {"size": g.size, "removed": list(g.removed)} for n, g in self.groups.items()},
            "slices": [
                {"tensor": s.tensor, "dim": s.dim, "size": s.size, "removed": list(s.removed)}
                for s in self.slices
            ],
            "tensors": {n: list(s) for n, s in self.tensors.items()},
            "sizes": [
                {"module": f.module, "function": f.function, "ordinal": f.ordinal, "sizes": dict(f.sizes)}
                for f in self.sizes
            ],
        }

    @classmethod
    def from_json(cls, data: Any, source: str = "the data") -> CompactionPlan:
        """Inverse of :meth:`to_json`. Raises :class:`PlanError` that names ``source`` when it is no valid plan."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"{source} is not a compaction plan (expected format {FORMAT!r})")
        if data.get("version") != VERSION:
            raise PlanError(
                f"{source} has plan version {data.get('version')!r}, this package reads version {VERSION}"
            )
        try:
            plan = cls(
                {
                    str(n): GroupRemoval(int(g["size"]), tuple(map(int, g["removed"])))
                    for n, g in data["groups"].items()
                },
                tuple(
                    TensorSlice(
                        str(s["tensor"]), int(s["dim"]), int(s["size"]), tuple(map(int, s["removed"]))
                    )
                    for s in data["slices"]
                ),
                {str(n): tuple(map(int, s)) for n, s in data["tensors"].items()},
                tuple(
                    SizeFix(
                        str(f["module"]),
                        str(f["function"]),
                        int(f["ordinal"]),
                        tuple((str(slot), int(n)) for slot, n in f["sizes"].items()),
                    )
                    for f in data.get("sizes", ())
                ),
            )
            plan._check_consistent()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise PlanError(
                f"{source} is a damaged compaction plan: {type(error).__name__}: {error}"
            ) from error
        return plan

    def _check_consistent(self) -> None:
        for name, group in self.groups.items():
            if list(group.removed) != sorted(set(group.removed)) or any(
                not 0 <= i < group.size for i in group.removed
            ):
                raise ValueError(
                    f"removed channels of {name!r} must be sorted, unique and within 0..{group.size - 1}"
                )
        for s in self.slices:
            if self.tensors[s.tensor][s.dim] != s.size:
                raise ValueError(f"slice of {s.tensor!r} does not fit its shape")
            if list(s.removed) != sorted(set(s.removed)) or any(not 0 <= i < s.size for i in s.removed):
                raise ValueError(
                    f"removed positions of {s.tensor!r} must be sorted, unique and within its size"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an existing file is replaced only when all of it is written."""
        write_atomically(Path(path), json.dumps(self.to_json(), indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompactionPlan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: the file is missing, is not JSON, or is not a plan.
        """
        try:
            data = json.loads(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise PlanError(f"no plan file at {os.fspath(path)!r}") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{os.fspath(path)!r} is not a readable plan file: {error}") from error
        return cls.from_json(data, repr(os.fspath(path)))
