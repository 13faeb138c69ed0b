"""Baselines that look at nothing: every learned choice has to beat them."""

from __future__ import annotations

import numpy as np
from torch import nn

from ..channels.groups import ChannelGraph
from .base import Saliency, criterion


@criterion("random")
def random(model: nn.Module, graph: ChannelGraph, seed: int) -> Saliency:
    """Uniform random ranking, reproducible by ``seed``."""
    return np.random.default_rng(seed).random(graph.num_channels)


@criterion("first_k")
def first_k(model: nn.Module, graph: ChannelGraph, seed: int) -> Saliency:
    """The first channels of every group are removed first, at the same rate everywhere (the source article's baseline)."""
    return np.concatenate([(np.arange(g.size) + 1) / g.size for g in graph.groups])
