"""What tracing returns: channel groups, and how every size in the network depends on them.

All prunable channels of a network have one numbering, ``0 .. graph.num_channels - 1``; a :class:`ChannelGroup` is a
contiguous range of it. Masks, gates and saliencies are flat vectors over this numbering.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from .labels import Freeze, Vector

Role = Literal["out", "in", "vector"]
#: a channel mask: True = live, shape [num_channels]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that a group controls.

    Attributes:
        tensor: qualified name, e.g. ``"layer1.0.conv1.weight"``.
        dim: which dimension is sliced when channels are removed.
        role: ``"out"`` (rows of a weight that produces the channels), ``"in"`` (columns of a weight that mixes them),
            ``"vector"`` (anything that follows along: bias, norm, depthwise filter, positional embedding).
        index: ``[size, k]``, the ``k`` positions along ``dim`` that belong to each channel (k = H*W behind a flatten).
    """

    tensor: str
    dim: int
    role: Role
    index: Vector


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that play the same part: removing one means slicing every member.

    Attributes:
        name: module that first produces the channels.
        start: id of the first channel; the group's ids are ``start .. start + size - 1``.
        size: number of channels.
        members: every tensor dimension that the group controls.
        gateable: False when a consumer reads its weight outside the module that owns it, so that no gate can be hung.
        is_stream: True for a residual stream: what several producers write into the channels is added up. Where it is
            multiplied (squeeze and excitation, gated units, queries and keys) it is none.
    """

    name: str
    start: int
    size: int
    members: tuple[Member, ...]
    gateable: bool = True
    is_stream: bool = False

    @property
    def ids(self) -> slice:
        """The group's range in flat vectors over all channels."""
        return slice(self.start, self.start + self.size)

    def by_role(self, role: Role) -> tuple[Member, ...]:
        """Members with the given role."""
        return tuple(m for m in self.members if m.role == role)


@dataclass(frozen=True)
class Axis:
    """A size that depends on the mask: ``fixed + sum(count * live[channel])``."""

    fixed: int
    channels: Vector
    counts: Vector

    def size(self, live: npt.NDArray[np.float64]) -> float:
        """Size of the axis for a (possibly fractional) mask ``live`` of shape [num_channels]."""
        return float(self.fixed + self.counts @ live[self.channels])


@dataclass(frozen=True)
class Term:
    """A product of axis sizes, times ``coefficient``: the MACs of one operation or the size of one parameter."""

    name: str
    coefficient: float
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class SizeRule:
    """A call in Python code whose sizes are hard-coded, and what they have to be.

    ``sizes`` names each number in the ``ordinal``-th call of ``function`` within the ``forward`` of ``module`` and the
    axis that it measures.
    """

    module: str
    function: str
    ordinal: int
    sizes: tuple[tuple[str, Axis], ...]


@dataclass(frozen=True)
class OutputSlices:
    """Labels of a module's output as channel ids (-1: not removable), per dimension or None. For naming a mismatch."""

    module: str
    dims: tuple[Vector | None, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """Result of :func:`lightning_prune.trace_channels`.

    Attributes:
        groups: all prunable channel groups, in order of execution.
        frozen: ``{"tensor[dim]": reason}`` for the weight dimensions that cannot be pruned.
        tensors: dense shape of every parameter and buffer.
        macs_terms / params_terms: how MACs (for the traced batch, divided by ``batch_size``) and parameters depend
            on the mask, see :class:`lightning_prune.cost.CostModel`.
        outputs: channel ids of module outputs in order of execution.
        sizes: hard-coded sizes in Python code that have to be replaced when channels go.
        num_channels: total number of prunable channels.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, Freeze]
    tensors: Mapping[str, tuple[int, ...]]
    macs_terms: tuple[Term, ...]
    params_terms: tuple[Term, ...]
    outputs: tuple[OutputSlices, ...] = field(repr=False, default=())
    sizes: tuple[SizeRule, ...] = field(repr=False, default=())

    @property
    def num_channels(self) -> int:
        """Number of prunable channels in all groups."""
        return sum(g.size for g in self.groups)

    @property
    def prunable(self) -> set[str]:
        """Names of the tensors that channels may be removed from."""
        return {member.tensor for group in self.groups for member in group.members}

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(
            f"no channel group named {name!r}; the groups are: {', '.join(g.name for g in self.groups)}"
        )

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def positions(self, tensor: str, dim: int, groups: Iterable[ChannelGroup] | None = None) -> Vector:
        """Channel id of every position along one dimension of a parameter or buffer, -1 where there is none.

        Of ``groups`` only, where given.
        """
        found = np.full(self.tensors[tensor][dim], -1, np.int64)
        for group in self.groups if groups is None else groups:
            for member in group.members:
                if (member.tensor, member.dim) == (tensor, dim):
                    found[member.index] = np.arange(group.start, group.start + group.size)[:, None]
        return found[self.left(tensor, dim)]

    def left(self, tensor: str, dim: int) -> Vector | slice:
        """Dense positions that the tensor still has along one dimension: all, unless channels have been cut out."""
        return slice(None)

    def here(self, tensor: str, dim: int, positions: Sequence[int]) -> Vector:
        """Where the dense ``positions`` are in the tensor as it is now; those that have been cut out are left out."""
        wanted = np.zeros(self.tensors[tensor][dim], dtype=bool)
        wanted[list(positions)] = True
        return np.flatnonzero(wanted[self.left(tensor, dim)])

    def group_of(self) -> Vector:
        """Index of the group of each channel, shape [num_channels]."""
        return np.repeat(np.arange(len(self.groups)), [g.size for g in self.groups]).astype(np.int64)

    def table(self) -> str:
        """Human-readable overview: groups, members, share of parameters and MACs, and every frozen dimension."""
        from .table import graph_table

        return graph_table(self)
