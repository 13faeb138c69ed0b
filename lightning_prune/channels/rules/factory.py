"""Constants made inside ``forward``. Their labels are wild: they take the size of whatever they are joined with."""

from __future__ import annotations

import numpy as np

from ..flow import Flow
from ..labels import WILD
from .registry import Call, rule


@rule("""
    zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like full_like
    empty_like rand_like randn_like rand randn scalar_tensor empty_strided new_empty_strided
""")
def constant(flow: Flow, call: Call) -> None:
    """Every position is alike, so any channel may be dropped from it."""
    out = call.outputs()[0]
    flow.set(out, [np.full(n, WILD, np.int64) for n in out.shape])


@rule("fill_", "zero_", "fill", "uniform_", "normal_", "bernoulli_", "resize_")
def refill(flow: Flow, call: Call) -> None:
    """In-place filling keeps the labels: the values change, the meaning of the positions does not."""
    out = call.outputs()[0]
    flow.set(out, flow.get(call.args[0]))


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "randperm", "lift_fresh")
def positional(flow: Flow, call: Call) -> None:
    """Every position differs: sizes are fixed."""
    if call.name == "aten.lift_fresh":
        flow.set(call.outputs()[0], flow.get(call.args[0]))
    else:
        out = call.outputs()[0]
        flow.set(out, [None] * out.dim())
