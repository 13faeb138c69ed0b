"""A traced network whose tensors have been cut: the old numbering of channels over fewer positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from .groups import ChannelGraph, Vector


@dataclass(frozen=True)
class NarrowGraph(ChannelGraph):
    """The channels of a network out of which some have been cut.

    Groups, numbering, costs and dense shapes are those of the dense network, so masks, gates and plans stay as they are; only
    :meth:`positions`, :meth:`left` and :meth:`here` speak of the tensors as they are now.

    Attributes:
        kept: (tensor, dimension) -> positions of the dense tensor that are left, sorted; whole dimensions are absent.
    """

    kept: Mapping[tuple[str, int], Vector] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ChannelGraph, removed: Mapping[tuple[str, int], tuple[int, ...]]) -> NarrowGraph:
        """``graph`` without the ``removed`` dense positions of each (tensor, dimension)."""
        kept = {
            (tensor, dim): np.delete(np.arange(graph.tensors[tensor][dim], dtype=np.int64), list(gone))
            for (tensor, dim), gone in removed.items()
        }
        return cls(**{f.name: getattr(graph, f.name) for f in fields(ChannelGraph)}, kept=kept)

    def left(self, tensor: str, dim: int) -> Vector | slice:
        """Dense positions that are left along one dimension."""
        return self.kept.get((tensor, dim), slice(None))
