"""Convolutions and matrix products: the only ops that mix channels exactly (a removed channel contributes zero)."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..flow import Flow
from ..labels import Labels, Vector
from .registry import Call, rule

_SPATIAL = "a convolution slides along this dimension"


def _or_fixed(vector: Vector | None, size: int) -> Vector:
    return vector if vector is not None else np.zeros(size, np.int64)


def _bias(flow: Flow, bias: Tensor | None, out: Vector) -> Vector:
    if bias is None:
        return out
    joined = flow.join_vectors([out, _or_fixed(flow.get(bias)[0], len(out))])
    return _or_fixed(joined, len(out))


@rule(
    "convolution",
    "_convolution",
    "mkldnn_convolution",
    "cudnn_convolution",
    "convolution_overrideable",
    "thnn_conv2d",
)
def convolution(flow: Flow, call: Call) -> None:
    """Dense, grouped, depthwise and transposed convolutions of any dimensionality."""
    x, weight, bias = call.args[:3]
    transposed, groups = bool(call.arg("transposed", False)), int(call.arg("groups", 1))
    out = call.outputs()[0]
    x_labels, w_labels = flow.get(x), flow.get(weight)
    unbatched = x.dim() == weight.dim() - 1
    channel = 0 if unbatched else 1
    for d, vector in enumerate(x_labels):
        if d > channel:
            flow.space.freeze(vector, _SPATIAL)
    for vector in w_labels[2:]:
        flow.space.freeze(vector, "kernel positions")

    arriving = _or_fixed(x_labels[channel], x.shape[channel])
    rows, columns = _or_fixed(w_labels[0], weight.shape[0]), _or_fixed(w_labels[1], weight.shape[1])
    w_in, w_out = (rows, columns) if transposed else (columns, rows)
    space, positions = flow.space, math.prod(weight.shape[2:])
    positions *= math.prod(x.shape[channel + 1 :] if transposed else out.shape[channel + 1 :])
    batch = 1 if unbatched else x.shape[0]
    in_channels, out_channels = x.shape[channel], out.shape[channel]

    if groups == 1:
        reached = flow.join_vectors([arriving, w_in])
        produced = _bias(flow, bias, w_out)
        flow.contraction(batch * positions, (w_in, w_out), weight, w_in, reached, (produced,))
    elif groups == in_channels:  # depthwise, possibly with a channel multiplier: in label = out label
        multiplier = out_channels // groups
        spread = np.repeat(arriving, multiplier)
        if transposed:
            space.unite(rows, arriving)
            space.freeze(columns, "output of a transposed depthwise convolution with a multiplier")
            produced = _bias(flow, bias, spread)
        else:
            space.unite(spread, rows)
            produced = _bias(flow, bias, _or_fixed(flow.join_vectors([spread, rows]), out_channels))
        axis = rows if transposed else produced
        flow.contraction(batch * positions * (multiplier if transposed else 1), (axis,), weight, None, None)
    else:  # the same offset in every group is removed together, so that groups keep equal size
        arrived = space.unite_all(arriving.reshape(groups, -1).T)
        if transposed:
            own_in, own_out = space.unite_all(rows.reshape(groups, -1).T), columns
            coefficient_axes = (np.repeat(own_in[None], groups, 0).ravel(), own_out)
        else:
            own_in, own_out = columns, space.unite_all(rows.reshape(groups, -1).T)
            coefficient_axes = (own_in, rows)
        reached = flow.join_vectors([arrived, own_in])
        produced = _bias(flow, bias, np.tile(own_out, groups))
        if transposed and (produced > 0).any():
            space.unite(produced, np.tile(own_out, groups))
        flow.contraction(batch * positions, coefficient_axes, weight, own_in, reached, (produced,))

    labels: Labels = [None] * out.dim()
    labels[channel] = produced
    if not unbatched:
        labels[0] = x_labels[0]
    flow.set(out, labels)


def _matmul(flow: Flow, a: Tensor, b: Tensor, out: Tensor) -> Labels:
    """``[..., n, k] @ [..., k, m]``: unite along k, pass n and m, join the batch dimensions."""
    la, lb = flow.get(a), flow.get(b)
    k = a.shape[-1]
    activations = flow.origin(a) is None and flow.origin(b) is None
    shared = flow.join_vectors([_or_fixed(la[-1], k), _or_fixed(lb[-2], k)], product=activations)
    batch = [
        flow.join_vectors([_or_fixed(x, a.shape[d]), _or_fixed(y, b.shape[d])])
        for d, (x, y) in enumerate(zip(la[:-2], lb[:-2], strict=True))
    ]
    labels: Labels = [*batch, la[-2], lb[-1]]
    axes: list[Vector | int] = []
    for vector, size in zip([*labels, shared], [*out.shape, k], strict=True):
        axes.append(vector if vector is not None and size > 1 else size)
    weight, weight_in = (b, lb[-2]) if flow.origin(b) is not None else (a, la[-1])
    flow.contraction(1.0, axes, weight, weight_in, shared, (labels[-1] if weight is b else labels[-2],))
    return labels


@rule("mm", "bmm")
def mm(flow: Flow, call: Call) -> None:
    """Plain and batched matrix products."""
    a, b = call.args[:2]
    out = call.outputs()[0]
    flow.set(out, _matmul(flow, a, b, out))


@rule("addmm", "baddbmm")
def addmm(flow: Flow, call: Call) -> None:
    """Matrix product plus a broadcast bias."""
    bias, a, b = call.args[:3]
    out = call.outputs()[0]
    flow.set(out, _matmul(flow, a, b, out))
    flow.set(out, flow.join([out, bias], out.shape))


@rule("mv", "addmv", "dot")
def mv(flow: Flow, call: Call) -> None:
    """Matrix-vector products: unite the contracted dimension."""
    *bias, a, b = [t for t in call.args if isinstance(t, Tensor)]
    la, lb = flow.get(a), flow.get(b)
    shared = flow.join_vectors([_or_fixed(la[-1], a.shape[-1]), _or_fixed(lb[0], b.shape[0])])
    out = call.outputs()[0]
    weight, weight_in = (b, lb[0]) if flow.origin(b) is not None else (a, la[-1])
    flow.contraction(
        float(a.numel()), (), weight, weight_in, shared, (la[0],) if weight is a and a.dim() > 1 else ()
    )
    flow.set(out, la[:-1])
    if bias:
        flow.set(out, flow.join([out, bias[0]], out.shape))


@rule("linear")
def linear(flow: Flow, call: Call) -> None:
    """``x @ weight.T + bias`` where aten keeps it whole."""
    x, weight = call.args[:2]
    bias = call.arg("bias")
    out = call.outputs()[0]
    lx, lw = flow.get(x), flow.get(weight)
    shared = flow.join_vectors([_or_fixed(lx[-1], x.shape[-1]), _or_fixed(lw[-1], weight.shape[-1])])
    w_in, w_out = _or_fixed(lw[1], weight.shape[1]), _or_fixed(lw[0], weight.shape[0])
    produced = _bias(flow, bias, w_out)
    flow.contraction(float(math.prod(x.shape[:-1])), (w_in, w_out), weight, w_in, shared, (produced,))
    flow.set(out, [*lx[:-1], produced])


@rule("""
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_attention_math scaled_dot_product_attention
""")
def attention(flow: Flow, call: Call) -> None:
    """softmax(q k^T * scale) v: value channels pass; query and key channels mix.

    The default scale counts those; as a sized call it keeps the dense network's number.
    """
    query, key, value = call.args[:3]
    lq, lk, lv = flow.get(query), flow.get(key), flow.get(value)
    space = flow.space
    shared = flow.join_vectors(
        [_or_fixed(lq[-1], query.shape[-1]), _or_fixed(lk[-1], key.shape[-1])], product=True
    )
    for labels in (lq, lk, lv):
        space.freeze(labels[-2], "attention mixes this dimension")
    leading = [
        flow.join_vectors([_or_fixed(v[d], query.shape[d]) for v in (lq, lk, lv)])
        if query.shape[d] == key.shape[d] == value.shape[d]
        else None
        for d in range(query.dim() - 2)
    ]
    for d, joined in enumerate(leading):
        for labels in (lq, lk, lv) if joined is None else ():
            space.freeze(labels[d], "attention shares heads of this dimension")
    out, *rest = call.outputs()
    pairs = float(math.prod(query.shape[:-1]) * key.shape[-2])
    flow.contraction(pairs, (_or_fixed(lq[-1], query.shape[-1]),), None, None, shared)
    flow.contraction(pairs, (_or_fixed(lv[-1], value.shape[-1]),), None, None, None)
    flow.set(out, [*leading, None, lv[-1]])
    for tensor in rest:
        flow.set(tensor, [None] * tensor.dim())


@rule("embedding")
def embedding(flow: Flow, call: Call) -> None:
    """Rows are looked up (fixed), columns are channels that the table produces."""
    weight = call.args[0]
    labels = flow.get(weight)
    flow.space.freeze(labels[0], "rows of an embedding are looked up by index")
    out = call.outputs()[0]
    if labels[1] is not None:
        flow.producers.append(labels[1])
    flow.set(out, [None] * (out.dim() - 1) + [labels[1]])
