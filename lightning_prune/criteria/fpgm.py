"""Filter pruning via geometric median (He et al. 2019): a filter that others can stand in for matters least."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..channels.groups import ChannelGraph
from ..channels.trace import named_tensors
from .base import Saliency, criterion


@criterion("fpgm")
def fpgm(model: nn.Module, graph: ChannelGraph, seed: int) -> Saliency:
    """Sum of Euclidean distances to the other filters of the group, relative to the group's mean.

    Filters close to the geometric median have the smallest sum (He et al. 2019, eq. 6). Filters of all producers of a
    stream are laid side by side.
    """
    tensors = named_tensors(model)
    values = np.zeros(graph.num_channels)
    for group in graph.groups:
        rows = []
        for member in group.by_role("out"):
            weight = tensors[member.tensor].detach().double().transpose(0, member.dim).flatten(1).cpu()
            rows.append(weight[torch.from_numpy(member.index)].flatten(1))
        filters = torch.cat(rows, dim=1)
        sums = torch.cdist(filters, filters).sum(dim=1).numpy()
        values[group.ids] = sums / max(float(sums.mean()), 1e-30)
    return values
