"""Views: which dimensions were merged or split, and what that demands of the labels.

A view cuts both shapes into blocks of equal element count. Merging repeats the labels (flatten: every position of a
channel's map gets that channel's label). Splitting a labelled dimension into several must leave each part with the same
number of channels, so the same offset is united across the outer parts (heads, channel shuffle).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..flow import Flow
from ..labels import FIXED, Labels, Vector
from .registry import Call, rule

Block = tuple[list[int], list[int]]


def blocks(source: Sequence[int], target: Sequence[int]) -> list[Block]:
    """Pair runs of dimensions with equal product; dimensions of size 1 are left out (they carry no labels).

    >>> blocks([2, 6, 4], [2, 2, 3, 4])
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    left = [d for d, n in enumerate(source) if n != 1]
    right = [d for d, n in enumerate(target) if n != 1]
    result: list[Block] = []
    i = j = 0
    while i < len(left) and j < len(right):
        ins, outs = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        a, b = source[ins[0]], target[outs[0]]
        while a != b:
            if a < b:
                a *= source[left[i]]
                ins.append(left[i])
                i += 1
            else:
                b *= target[right[j]]
                outs.append(right[j])
                j += 1
        result.append((ins, outs))
    return result


def reshape_labels(
    flow: Flow, labels: Labels, source: Sequence[int], target: Sequence[int], open_dim: int | None = None
) -> Labels:
    """Labels of a tensor of shape ``source`` after a view to ``target``; ``open_dim`` was given as -1 by the user."""
    result: Labels = [None] * len(target)
    if math.prod(source) == 0:
        for vector in labels:
            flow.space.freeze(vector, "reshaped while empty")
        return result
    for ins, outs in blocks(source, target):
        labelled = [d for d in ins if labels[d] is not None]
        if not labelled:
            continue
        real = [d for d in labelled if not _is_soft(flow, labels[d])] or labelled[:1]
        for d in real[1:] if len(real) > 1 else ():
            flow.space.freeze(labels[d], "two channel dimensions merged by a reshape")
        for d in set(labelled) - set(real[:1]):
            flow.space.freeze(labels[d], "merged with channels by a reshape")
        d = real[0]
        vector = labels[d]
        assert vector is not None
        view = vector.reshape([-1 if e == d else 1 for e in ins])
        element = np.broadcast_to(view, [source[e] for e in ins]).reshape([target[e] for e in outs])
        dim, vector = _one_dimension(flow, element, outs, open_dim)
        if dim is not None:
            result[dim] = vector
    return result


def _is_soft(flow: Flow, vector: Vector | None) -> bool:
    return vector is not None and flow.space.is_soft(vector)


def _one_dimension(
    flow: Flow, element: np.ndarray, dims: list[int], open_dim: int | None
) -> tuple[int | None, Vector | None]:
    """Make per-element labels depend on one dimension only, uniting where they depend on more."""
    if element.ndim == 1:
        return dims[0], element
    varying = [i for i in range(element.ndim) if (element != element.take([0], axis=i)).any()]
    if not varying:
        flow.space.freeze(element.ravel(), "one channel spread over a whole dimension")
        return None, None
    # most code splits channels into few parts of many (heads, shuffles) or into many channels of few positions
    keep = max(varying, key=lambda i: (dims[i] == open_dim, element.shape[i], i))
    moved = np.moveaxis(element, keep, 0).reshape(element.shape[keep], -1)
    if len(varying) == 1 and (moved != FIXED).all():
        return dims[keep], moved[:, 0].copy()
    return dims[keep], flow.space.unite_all(moved)


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "flatten", "_reshape_copy", "unflatten"
)
def view(flow: Flow, call: Call) -> None:
    """Merging and splitting of dimensions. A same-shape view keeps aliasing label vectors."""
    x = call.args[0]
    out = call.outputs()[0]
    if x.shape == out.shape:
        flow.set(out, flow.get(x))
        return
    size = call.arg("size")
    open_dim = list(size).index(-1) if isinstance(size, (list, tuple)) and -1 in size else None
    flow.set(out, reshape_labels(flow, flow.get(x), x.shape, out.shape, open_dim))


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, call: Call) -> None:
    """``[.., C r^2, H, W] -> [.., C, H r, W r]``: the r^2 sub-pixels of a channel go together."""
    x, factor = call.args[:2]
    labels = flow.get(x)
    channel = x.dim() - 3
    if labels[channel] is not None:
        labels[channel] = flow.space.unite_all(labels[channel].reshape(-1, factor * factor))
    flow.set(call.outputs()[0], labels)


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, call: Call) -> None:
    """``[.., C, H r, W r] -> [.., C r^2, H, W]``: each channel becomes r^2 channels with its label."""
    x, factor = call.args[:2]
    labels = flow.get(x)
    channel = x.dim() - 3
    if labels[channel] is not None:
        labels[channel] = np.repeat(labels[channel], factor * factor)
    flow.set(call.outputs()[0], labels)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(flow: Flow, call: Call) -> None:
    """``[N, g k, ..] -> [N, k g, ..]``: the same offset of every group goes together."""
    x, groups = call.args[:2]
    labels = flow.get(x)
    if labels[1] is not None:
        labels[1] = np.repeat(flow.space.unite_all(labels[1].reshape(groups, -1).T), groups)
    flow.set(call.outputs()[0], labels)


@rule("im2col")
def im2col(flow: Flow, call: Call) -> None:
    """``[N, C, H, W] -> [N, C kh kw, L]``."""
    x = call.args[0]
    out = call.outputs()[0]
    labels = flow.get(x)
    channel = x.dim() - 3
    for d in (channel + 1, channel + 2):
        flow.space.freeze(labels[d], "unfolded along this dimension")
    own = labels[channel]
    kernel = out.shape[channel] // x.shape[channel]
    result: Labels = [None] * out.dim()
    result[channel] = np.repeat(own, kernel) if own is not None else None
    flow.set(out, result)
