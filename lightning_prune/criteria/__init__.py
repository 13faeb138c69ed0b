"""Saliency criteria: how much each channel matters, from the weights alone.

Every criterion is a function ``(model, graph, seed) -> saliency`` of shape [graph.num_channels]; larger means keep. The
selector in ``budget`` turns any saliency into a mask that meets a budget.
"""

from . import baselines, fpgm, magnitude  # noqa: F401  (they register themselves)
from .base import CRITERIA, Criterion, criterion, saliency

__all__ = ["CRITERIA", "Criterion", "criterion", "saliency"]
