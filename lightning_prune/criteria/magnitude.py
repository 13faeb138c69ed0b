"""Filter magnitude (Li et al. 2017, "Pruning Filters for Efficient ConvNets")."""

from __future__ import annotations

import numpy as np
from torch import nn

from ..channels.groups import ChannelGraph
from ..channels.trace import named_tensors
from .base import Saliency, criterion


@criterion("magnitude")
def magnitude(model: nn.Module, graph: ChannelGraph, seed: int) -> Saliency:
    """L2 norm of the filters that produce each channel, relative to the mean of its group.

    All producers of a stream count together. Norms of different layers have different units, so each group is divided by
    its mean: a global ranking then compares like with like.
    """
    tensors = named_tensors(model)
    values = np.zeros(graph.num_channels)
    for group in graph.groups:
        squares = np.zeros(group.size)
        for member in group.by_role("out"):
            weight = tensors[member.tensor].detach().double().transpose(0, member.dim).flatten(1)
            rows = weight.square().sum(1).cpu().numpy()
            squares += rows[member.index].sum(axis=1)
        norms = np.sqrt(squares)
        values[group.ids] = norms / max(float(norms.mean()), 1e-30)
    return values
