"""The registry of criteria, and what they share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import nn

from ..channels.groups import ChannelGraph

Saliency = npt.NDArray[np.float64]
Criterion = Callable[[nn.Module, ChannelGraph, int], Saliency]
CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a criterion under ``name``, usable as ``method=name``."""

    def add(function: Criterion) -> Criterion:
        CRITERIA[name] = function
        return function

    return add


def saliency(name: str, model: nn.Module, graph: ChannelGraph, seed: int = 0) -> Saliency:
    """Saliency of every channel by the criterion ``name``, shape [graph.num_channels].

    Raises:
        ValueError: no criterion of that name.
    """
    if name not in CRITERIA:
        raise ValueError(f"method must be one of {', '.join(sorted(CRITERIA))}, got {name!r}")
    values = CRITERIA[name](model, graph, seed)
    if values.shape != (graph.num_channels,) or not np.isfinite(values).all():
        raise ValueError(
            f"criterion {name!r} must return {graph.num_channels} finite values, got shape {values.shape}"
        )
    return values
