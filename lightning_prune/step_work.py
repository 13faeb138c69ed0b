"""Multiply-accumulates that a training step really computes: all but those of channels that are cut out or skipped."""

from __future__ import annotations

import numpy as np
from torch import nn

from .channels.groups import ChannelGraph, Mask, Term
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
        mask = present.astype(np.float64)
        for module, share in skipper.left_out():
            for term in self._terms.get(names[module], ()) if share and module in names else ():
                macs -= share * term.coefficient * float(np.prod([axis.size(mask) for axis in term.axes]))
        return macs
