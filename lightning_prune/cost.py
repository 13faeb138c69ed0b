"""What a mask costs: MACs and parameters as products of sizes that depend on the live channels."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from .channels.groups import ChannelGraph, Term

Metric = Literal["macs", "params"]
COUNTED: tuple[str, ...] = ("macs", "params")
METRICS: tuple[str, ...] = (*COUNTED, "latency")
Floats = npt.NDArray[np.float64]


class Cost(Protocol):
    """What selection needs to know of a metric."""

    metric: str
    num_channels: int
    dense: float

    def cost(self, mask: npt.NDArray[np.generic]) -> float:
        """Cost of a mask."""

    def marginal(self, mask: npt.NDArray[np.generic]) -> Floats:
        """What one more of each channel costs."""


class CostModel:
    """Cost of a network as a function of a flat mask over all channels.

    ``cost(mask) = sum_t coefficient_t * prod_a (fixed_a + counts_a @ mask)``: every convolution contributes
    (live inputs) x (live outputs) x positions, every parameter the product of its live dimensions. Works for hard masks
    and for fractional ones (expected cost under independent gates, exact up to the covariance within a term).

    Args:
        graph: result of ``trace_channels``.
        metric: ``"macs"`` (multiply-accumulates per sample) or ``"params"``.
    """

    def __init__(self, graph: ChannelGraph, metric: Metric = "macs") -> None:
        if metric not in COUNTED:
            raise ValueError(f"CostModel counts {' or '.join(COUNTED)}, got metric={metric!r}")
        terms: tuple[Term, ...] = graph.macs_terms if metric == "macs" else graph.params_terms
        self.metric: str = metric
        self.num_channels = graph.num_channels
        live_terms = [t for t in terms if any(len(a.channels) for a in t.axes)]
        ones = np.ones(self.num_channels)
        self._constant = sum(
            t.coefficient * float(np.prod([a.size(ones) for a in t.axes]))
            for t in terms
            if not any(len(a.channels) for a in t.axes)
        )
        self._coefficient = np.array([t.coefficient for t in live_terms], np.float64)
        width = max((len(t.axes) for t in live_terms), default=1)
        # one row per (term, axis); missing axes are constant 1
        self._fixed = np.ones((len(live_terms), width))
        rows, channels, counts = [], [], []
        for i, term in enumerate(live_terms):
            for j, axis in enumerate(term.axes):
                self._fixed[i, j] = axis.fixed
                rows.append(np.full(len(axis.channels), i * width + j))
                channels.append(axis.channels)
                counts.append(axis.counts)
        self._rows = np.concatenate(rows) if rows else np.empty(0, np.int64)
        self._channels = np.concatenate(channels) if channels else np.empty(0, np.int64)
        self._counts = np.concatenate(counts).astype(np.float64) if counts else np.empty(0)
        self.dense = self.cost(ones)

    def _sizes(self, mask: Floats) -> Floats:
        sizes = np.bincount(self._rows, self._counts * mask[self._channels], minlength=self._fixed.size)
        return self._fixed + sizes.reshape(self._fixed.shape)

    def cost(self, mask: npt.NDArray[np.generic]) -> float:
        """Cost of ``mask``, shape [num_channels], boolean or in [0, 1]."""
        return self._constant + float(self._coefficient @ self._sizes(mask.astype(np.float64)).prod(axis=1))

    def marginal(self, mask: npt.NDArray[np.generic]) -> Floats:
        """``d cost / d mask``, shape [num_channels]: what one more of each channel costs at ``mask``."""
        sizes = self._sizes(mask.astype(np.float64))
        others = np.empty_like(sizes)
        for j in range(sizes.shape[1]):
            others[:, j] = np.delete(sizes, j, axis=1).prod(axis=1) * self._coefficient
        weights = others.ravel()[self._rows] * self._counts
        return np.bincount(self._channels, weights, minlength=self.num_channels).astype(np.float64)
