"""The filters of the first convolution, before a fit and now."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .channels.groups import ChannelGraph, Mask
from .outcome import FirstFilters
from .weights import WeightKeeper, first_convolution


class FirstFilterWatch:
    """Remembers them as they are when the fit begins, or ``before``, as a checkpoint has them."""

    def __init__(
        self, graph: ChannelGraph, model: nn.Module, keeper: WeightKeeper, before: Tensor | None
    ) -> None:
        self._graph, self._keeper = graph, keeper
        self._name = first_convolution(graph, model)
        if self._name is not None:
            weight = keeper.weight(self._name) if before is None else before
            self._before = weight.detach().cpu().clone()

    def now(self, mask: Mask, full_size: contextlib.AbstractContextManager[None]) -> FirstFilters | None:
        """Before and now, read inside ``full_size``; None without a convolution."""
        if self._name is None:
            return None
        channels = self._graph.positions(f"{self._name}.weight" if self._name else "weight", 0)
        live = torch.from_numpy(np.append(mask, True)[channels])
        with full_size:
            after = self._keeper.weight(self._name).detach().cpu().clone()
        return FirstFilters(self._name, self._before, after, live)

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"filters": self._before} if self._name is not None else {}
