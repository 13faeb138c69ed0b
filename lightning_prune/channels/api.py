"""Public entry: trace, try a smaller copy for real, freeze what does not hold, return the graph."""

from __future__ import annotations

from torch import nn

from ..errors import TraceError
from ..inputs import ExampleInputs, batch_size, to_model
from .build import build_graph
from .groups import ChannelGraph
from .trace import run_labels
from .trial import settle


def trace_once(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGraph:
    """Trace without trying a smaller copy: one forward pass."""
    flow, tensors, outputs = run_labels(model, example_inputs)
    return build_graph(model, flow, tensors, outputs, batch_size(example_inputs))


def trace_channels(model: nn.Module, example_inputs: ExampleInputs, *, trial: bool = True) -> ChannelGraph:
    """Find all channels that can be removed from ``model``, and what has to go with each.

    The eager model runs once on ``example_inputs`` with channel labels beside every tensor; then a randomly thinned
    copy runs for real, and whatever breaks on a size hard-coded in Python is frozen and reported. ``model`` is not
    changed: evaluation mode, no gradients, buffers and random state restored.

    Args:
        model: any ``nn.Module`` (a LightningModule's ``forward`` is traced; a compiled model's original).
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for ``forward``.
        trial: run the thinned copy. Without it, hard-coded sizes show only when compacting.

    Returns:
        A :class:`ChannelGraph`. It may have no groups; ``.frozen`` then says why.

    Raises:
        TraceError: ``forward`` fails on the example input.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"model must be an nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    inputs = to_model(example_inputs, model)
    flow, tensors, outputs = run_labels(model, inputs)

    def build() -> ChannelGraph:
        return build_graph(model, flow, tensors, outputs, batch_size(inputs))

    return settle(model, inputs, flow, build) if trial else build()
