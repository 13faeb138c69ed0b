"""Multiply-accumulates that a training step really computes: all but those of channels that are cut out or skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from .channels.groups import ChannelGraph, Mask, Term
from .conv_ways import SKIP
from .cost import CostModel
from .hooks import compiled
from .skipping import DeadChannelSkipper


class StepWork:
    """Counts what a sample's forward pass computes; the backward pass leaves out the same.

    Channels that are merely zero count: wherever a layer is computed in full (by the user's call, under autocast on the CPU, in
    ``torch.compile``, where leaving them out was slower) nothing is saved.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._macs = CostModel(graph, "macs")
        self._terms: dict[str, list[Term]] = {}
        for term in graph.macs_terms:
            self._terms.setdefault(term.name, []).append(term)

    def count(self, model: nn.Module, present: Mask, skipper: DeadChannelSkipper | None) -> float:
        """Multiply-accumulates of the step whose forward pass has just run.

        Args:
            model: what runs.
            present: channels that are not cut out, bool of shape [num_channels].
            skipper: of its convolutions, if any.
        """
        macs = self._macs.cost(present)
        if skipper is None:
            return macs
        plain = {inner for module in model.modules() if compiled(module) for inner in module.modules()}
        names = {module: name for name, module in model.named_modules() if module not in plain}
        narrow = skipper._maps is not None and skipper._maps._last
        mask = present.astype(np.float64)
        for layer in skipper._layers:
            share = (1.0 - layer.share) * _skipped(layer, narrow)
            for term in self._terms.get(names[layer.module], ()) if share and layer.module in names else ():
                macs -= share * term.coefficient * float(np.prod([axis.size(mask) for axis in term.axes]))
        return macs


def _skipped(layer: Any, narrow: bool) -> float:
    """Share of a convolution's three parts that leaves its dead channels out; ``narrow``: the maps have none."""
    if narrow and (layer.live_in is not None or layer.live_out is not None):
        return 1.0
    known = [verdict for kind, verdict in layer.verdicts.items() if kind[1] is not True and any(kind[-3])]
    if not known:
        return 0.0
    _, newest = min(known, key=lambda verdict: verdict[0])
    return sum(way == SKIP for way in newest) / len(newest)
