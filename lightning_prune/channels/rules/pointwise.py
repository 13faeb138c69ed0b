"""Elementwise ops: labels unite index by index under broadcasting (residual add, SE scale, gated units, bias)."""

from __future__ import annotations

import numpy as np

from ..flow import Flow
from ..labels import Labels
from .registry import Call, rule, tensors_of

_PRODUCTS = ("aten.mul", "aten.div")


def pointwise(flow: Flow, call: Call) -> None:
    """Any op whose output element depends only on the input elements at the same (broadcast) position."""
    sources = [t for t in tensors_of((call.args, call.kwargs)) if t.dim() > 0]
    # two activations: what is multiplied by a parameter only keeps its own channels
    product = call.name.removesuffix("_") in _PRODUCTS and all(flow.origin(t) is None for t in sources)
    for out in call.outputs():
        flow.set(out, flow.join([t for t in sources if t.dim() <= out.dim()], out.shape, product))
        if sources and all(flow.origin(t) is not None for t in sources):
            flow.inherit(out, max(sources, key=lambda t: t.numel()))  # a weight computed from parameters


rule("""
    native_dropout dropout masked_fill where clamp rrelu_with_noise hardswish hardsigmoid mish selu celu relu6 silu gelu
    log_sigmoid log_sigmoid_forward softplus hardtanh nan_to_num copysign heaviside complex polar
    isnan isfinite isinf isneginf isposinf isclose where_self floor_divide true_divide float_power xlogy special_entr
""")(pointwise)


@rule("_prelu_kernel", "prelu")
def prelu(flow: Flow, call: Call) -> None:
    """PReLU: one slope per channel; a 1-D slope belongs to dimension 1."""
    x, weight = call.args[:2]
    out = call.outputs()[0]
    labels = flow.join([x], out.shape)
    if weight.numel() > 1 and weight.dim() == 1 and x.dim() > 1:
        (slope,) = flow.get(weight)
        own = labels[1]
        labels[1] = flow.join_vectors(
            [
                own if own is not None else np.zeros(x.shape[1], np.int64),
                slope if slope is not None else _fixed(weight),
            ]
        )
    elif weight.dim() == x.dim():
        labels = flow.join([x, weight], out.shape)
    flow.set(out, labels)


def _fixed(tensor: object) -> np.ndarray:
    return np.zeros(tensor.numel(), np.int64)  # type: ignore[attr-defined]


@rule("copy_", "copy")
def copy(flow: Flow, call: Call) -> None:
    """``target[...] = source``: both are united, and with the target whatever it is a view of."""
    target, source = call.args[:2]
    mine = flow.get(target)
    theirs: Labels = [None] * target.dim()
    if source.dim() <= target.dim():
        theirs = flow.join([source], target.shape)
    for d, vector in enumerate(mine):
        found = theirs[d]
        other = found if found is not None else np.zeros(target.shape[d], np.int64)
        if vector is None:
            flow.space.freeze(other, "written into a tensor of fixed size")
            continue
        flow.space.unite(vector, other)
    if call.outputs()[0] is not target:
        flow.set(call.outputs()[0], mine)
