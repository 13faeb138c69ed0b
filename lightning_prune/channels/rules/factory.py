"""Constants made inside ``forward``: soft labels, which take the size of whatever the constant is joined with."""

from __future__ import annotations

from ..flow import Flow
from .registry import Call, rule


@rule("zeros ones full empty new_zeros new_ones new_full new_empty rand randn")
@rule("empty_strided new_empty_strided scalar_tensor")
def constant(flow: Flow, call: Call) -> None:
    """Every position is alike, so any channel may be dropped from it."""
    out = call.outputs()[0]
    flow.set(out, [flow.space.soft(n) if n > 1 else None for n in out.shape])


@rule("zeros_like ones_like full_like empty_like rand_like randn_like bernoulli")
def like(flow: Flow, call: Call) -> None:
    """Takes its size from another tensor, and with it the labels."""
    flow.set(call.outputs()[0], flow.get(call.args[0]))


@rule("fill_ zero_ fill uniform_ normal_ bernoulli_ lift_fresh")
def refill(flow: Flow, call: Call) -> None:
    """In-place filling keeps the labels: the values change, the meaning of the positions does not."""
    flow.set(call.outputs()[0], flow.get(call.args[0]))


@rule("arange linspace eye tril_indices triu_indices randperm")
def positional(flow: Flow, call: Call) -> None:
    """Every position differs: sizes are fixed."""
    out = call.outputs()[0]
    flow.set(out, [None] * out.dim())
