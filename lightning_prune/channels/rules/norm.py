"""Normalisations. Batch norm treats channels one by one; the others take statistics over them, in which zeros count."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..flow import Flow
from ..labels import Vector
from .registry import Call, rule


def _vector(flow: Flow, tensor: Tensor) -> Vector:
    (vector,) = flow.get(tensor)
    return vector if vector is not None else np.zeros(tensor.numel(), np.int64)


def _per_channel(flow: Flow, x: Tensor, vectors: list[Tensor], channel_dim: int) -> list[Vector | None]:
    labels = flow.get(x)
    own = labels[channel_dim]
    rows = [own if own is not None else np.zeros(x.shape[channel_dim], np.int64)]
    labels[channel_dim] = flow.join_vectors(rows + [_vector(flow, v) for v in vectors])
    return labels


@rule("""
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    miopen_batch_norm _batch_norm_with_update _batch_norm_no_update batch_norm
""")
def batch_norm(flow: Flow, call: Call) -> None:
    """Input, weight, bias and running statistics share the labels of dimension 1."""
    x = call.args[0]
    vectors = [a for a in call.args[1:] if isinstance(a, Tensor) and a.dim() == 1 and a.numel() == x.shape[1]]
    if (
        call.arg("training", call.name == "aten._batch_norm_with_update")
        and call.name != "aten._batch_norm_no_update"
    ):
        for d, vector in enumerate(flow.get(x)):
            if d != 1:
                flow.space.freeze(vector, "batch statistics are taken over these channels")
    labels = _per_channel(flow, x, vectors, 1)
    out, *saved = call.outputs()
    flow.set(out, labels)
    for tensor in saved:
        same = tensor.dim() == 1 and tensor.numel() == x.shape[1]
        flow.set(tensor, [labels[1]] if same else [None] * tensor.dim())


@rule("native_layer_norm _fused_rms_norm rms_norm layer_norm")
def layer_norm(flow: Flow, call: Call) -> None:
    """Zeros may go as long as they are still counted, see ``counts``; weight and bias follow their channels."""
    x, normalized_shape = call.args[:2]
    out, *saved = call.outputs()
    first = x.dim() - len(normalized_shape)
    vectors = [a for a in call.args[2:] if isinstance(a, Tensor)]
    _counted(flow, [v for v in flow.get(x)[first:] if v is not None])
    flow.set(out, flow.join([x, *vectors], out.shape))
    for tensor in saved:
        flow.set(tensor, [*flow.get(x)[:first], *[None] * (tensor.dim() - first)][: tensor.dim()])


def _counted(flow: Flow, vectors: list[Vector]) -> None:
    """The statistics read these channels where no gate can be hung."""
    for vector in vectors:
        flow.contraction(0.0, (), None, None, vector)


@rule("_weight_norm_interface _weight_norm")
def weight_norm(flow: Flow, call: Call) -> None:
    """``g * v / norm(v)``: zero columns add nothing to the norm, so both directions may shrink."""
    v, g = call.args[:2]
    dim = call.arg("dim", 0)
    out, *norms = call.outputs()
    flow.set(out, flow.join([v, g], v.shape))
    flow.inherit(out, v)
    for vector in [x for d, x in enumerate(flow.get(v)) if d != dim]:
        if vector is not None:
            flow.mixed.append(vector)
    for norm in norms:
        flow.set(norm, flow.get(g) if norm.shape == g.shape else [None] * norm.dim())


@rule("native_group_norm group_norm")
def group_norm(flow: Flow, call: Call) -> None:
    """As layer norm, with the same offsets of every group going together, so that groups keep equal size."""
    x, groups = call.args[0], call.arg("group", call.arg("num_groups"))
    vectors = [a for a in call.args[1:] if isinstance(a, Tensor)]
    labels = _per_channel(flow, x, vectors, 1)
    own = labels[1]
    if own is not None:
        own = np.tile(flow.space.unite_all(own.reshape(groups, -1).T), groups)
        _counted(flow, [own])
        labels[1] = own
    out, *saved = call.outputs()
    flow.set(out, labels)
    for tensor in saved:
        flow.set(tensor, [None] * tensor.dim())
