"""Pure data movement: labels move with the data."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..flow import Flow
from ..labels import FIXED, Labels, Vector
from .registry import Call, rule


@rule("""
    clone contiguous detach alias _to_copy detach_ lift_fresh_copy to positive requires_grad_ view_as
    conj _conj resolve_conj resolve_neg set_ _to_dense to_dense _pin_memory pin_memory
""")
def same(flow: Flow, call: Call) -> None:
    """Copies and aliases."""
    flow.set(call.outputs()[0], flow.get(call.args[0]))


@rule("as_strided as_strided_")
def as_strided(flow: Flow, call: Call) -> None:
    """Aten uses it to restore a memory format: the same shape keeps its labels. Anything else is unknown."""
    x, out = call.args[0], call.outputs()[0]
    before = flow.get(x)
    if list(call.args[1]) == list(x.shape) and call.arg("storage_offset") in (None, 0, x.storage_offset()):
        flow.set(out, before)
        return
    flow.freeze_tensor(x, "read with strides of its own")
    flow.set(out, [None] * out.dim())


@rule("permute", "transpose", "t", "numpy_T", "adjoint", "movedim", "swapaxes", "transpose_")
def permute(flow: Flow, call: Call) -> None:
    """Reordered dimensions."""
    x = call.args[0]
    labels = flow.get(x)
    if call.name == "aten.permute":
        order = [d % x.dim() for d in call.args[1]]
    else:
        order = list(range(x.dim()))
        a, b = call.args[1:3] if len(call.args) > 2 else (0, x.dim() - 1)
        if x.dim() > 1:
            order[a], order[b] = order[b], order[a]
    flow.set(call.outputs()[0], [labels[d] for d in order])


@rule("unsqueeze", "unsqueeze_")
def unsqueeze(flow: Flow, call: Call) -> None:
    """A new dimension of size 1."""
    out = call.outputs()[0]
    labels = flow.get(call.args[0])
    labels.insert(call.args[1] % out.dim(), None)
    flow.set(out, labels)


@rule("squeeze", "squeeze_")
def squeeze(flow: Flow, call: Call) -> None:
    """Dropped dimensions of size 1."""
    x = call.args[0]
    dims = range(x.dim()) if len(call.args) == 1 else call.args[1]
    drop = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims) if x.shape[d] == 1}
    flow.set(call.outputs()[0], [v for d, v in enumerate(flow.get(x)) if d not in drop])


@rule("expand", "broadcast_to", "expand_copy")
def expand(flow: Flow, call: Call) -> None:
    """Broadcast dimensions repeat one position: their size is that of whatever they meet."""
    x = call.args[0]
    out = call.outputs()[0]
    lead = out.dim() - x.dim()
    labels: Labels = [flow.space.soft(n) if n > 1 else None for n in out.shape[:lead]]
    for d, vector in enumerate(flow.get(x)):
        size = out.shape[lead + d]
        labels.append(vector if x.shape[d] == size else flow.space.soft(size))
    flow.set(out, labels)


def _part(flow: Flow, vector: Vector | None, start: int, length: int) -> Vector | None:
    """Labels of one part of a dimension. Even parts stay equal, since most code computes them from the whole size."""
    if vector is None or length == len(vector):
        return vector
    part = vector[start : start + length]
    if flow.space.is_soft(vector):
        return part  # a constant that is filled in pieces
    if length and len(vector) % length == 0 and start % length == 0:
        flow.space.unite_all(vector.reshape(-1, length).T)
    return part


@rule("slice", "narrow", "slice_copy")
def slice_(flow: Flow, call: Call) -> None:
    """``x[a:b:s]`` along one dimension."""
    x = call.args[0]
    out = call.outputs()[0]
    dim = call.arg("dim", 0) % x.dim()
    labels = flow.get(x)
    vector = labels[dim]
    if vector is not None:
        start, step, size = call.arg("start") or 0, call.arg("step", 1) or 1, x.shape[dim]
        start = max(0, start + size if start < 0 else start)
        if step == 1:
            labels[dim] = _part(flow, vector, min(start, size), out.shape[dim])
        else:
            flow.space.freeze(vector, "sliced with a step")
            labels[dim] = None
    flow.set(out, labels)


@rule("""
    split split_with_sizes chunk unbind unsafe_split unsafe_chunk unsafe_split_with_sizes split_copy
    split_with_sizes_copy
""")
def split(flow: Flow, call: Call) -> None:
    """Equal parts keep equal sizes; unequal ones are hard-coded. ``unbind`` picks single positions."""
    x = call.args[0]
    dim = call.arg("dim", 0) % x.dim()
    start = 0
    for out in call.outputs():
        labels = flow.get(x)
        if call.name == "aten.unbind":
            flow.space.freeze(labels[dim], "single channels picked out by unbind")
            del labels[dim]
        else:
            labels[dim] = _part(flow, labels[dim], start, out.shape[dim])
            start += out.shape[dim]
        flow.set(out, labels)


@rule("select", "select_copy")
def select(flow: Flow, call: Call) -> None:
    """``x[i]``: the picked position needs its neighbours to stay where they are."""
    x, dim, _ = call.args
    labels = flow.get(x)
    flow.space.freeze(labels[dim], "a single channel picked out by its index")
    del labels[dim % x.dim()]
    flow.set(call.outputs()[0], labels)


@rule("cat", "concat", "concatenate")
def cat(flow: Flow, call: Call) -> None:
    """Concatenation: labels line up along the dimension, and unite on all others."""
    out = call.outputs()[0]
    tensors = [t for t in call.args[0] if not (t.dim() == 1 and t.numel() == 0)]
    dim = call.arg("dim", 0) % out.dim()
    columns = [flow.get(t) for t in tensors]
    labels: Labels = []
    for d in range(out.dim()):
        vectors = [_or_fixed(c[d], t.shape[d]) for c, t in zip(columns, tensors, strict=True)]
        if d == dim:
            joined = np.concatenate(vectors)
            labels.append(joined if (joined != FIXED).any() else None)
        else:
            labels.append(flow.join_vectors(vectors))
    flow.set(out, labels)


@rule("stack")
def stack(flow: Flow, call: Call) -> None:
    """A new dimension of fixed size; all others unite."""
    out = call.outputs()[0]
    dim = call.arg("dim", 0) % out.dim()
    tensors = call.args[0]
    labels = flow.join(tensors, tensors[0].shape)
    labels.insert(dim, None)
    flow.set(out, labels)


@rule("constant_pad_nd")
def pad(flow: Flow, call: Call) -> None:
    """Padding adds a fixed number of positions that cannot be removed; a negative pad crops."""
    x, amounts = call.args[:2]
    labels = flow.get(x)
    for i in range(0, len(amounts), 2):
        d = x.dim() - 1 - i // 2
        vector, (before, after) = labels[d], amounts[i : i + 2]
        if vector is None or (before == 0 and after == 0):
            continue
        if before < 0 or after < 0:
            flow.space.freeze(vector, "cropped at a hard-coded size")
            labels[d] = None
        else:
            labels[d] = np.pad(vector, (before, after), constant_values=FIXED)
    flow.set(call.outputs()[0], labels)


@rule("flip", "fliplr", "flipud")
def flip(flow: Flow, call: Call) -> None:
    """Reversed order."""
    x, dims = call.args[:2]
    reverse = {d % x.dim() for d in dims}
    flow.set(
        call.outputs()[0],
        [v[::-1].copy() if v is not None and d in reverse else v for d, v in enumerate(flow.get(x))],
    )


@rule("roll")
def roll(flow: Flow, call: Call) -> None:
    """Cyclic shift by a hard-coded distance."""
    x = call.args[0]
    labels = flow.get(x)
    dims = call.arg("dims") or list(range(x.dim()))
    for d in dims:
        flow.space.freeze(labels[d], "rolled by a hard-coded distance")
        labels[d] = None
    flow.set(call.outputs()[0], labels)


@rule("repeat", "tile")
def repeat(flow: Flow, call: Call) -> None:
    """Whole copies along a dimension."""
    x, repeats = call.args[:2]
    lead = len(repeats) - x.dim()
    labels: Labels = [None] * lead
    for d, vector in enumerate(flow.get(x)):
        labels.append(np.tile(vector, repeats[lead + d]) if vector is not None else None)
    flow.set(call.outputs()[0], labels)


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, call: Call) -> None:
    """Each position several times in a row."""
    x, out = call.args[0], call.outputs()[0]
    dim = call.arg("dim")
    labels = flow.get(x)
    repeats = call.arg("repeats")
    if isinstance(repeats, int) and dim is not None:
        d = dim % x.dim()
        vector = labels[d]
        labels[d] = np.repeat(vector, repeats) if vector is not None else None
        flow.set(out, labels)
    else:
        flow.freeze_tensor(x, "repeated by a tensor of counts")
        flow.set(out, [None] * out.dim())


@rule("index_select", "gather", "take_along_dim", "scatter", "scatter_add", "index_add", "index_copy")
def index_select(flow: Flow, call: Call) -> None:
    """Positions given as numbers: the indexed dimension is frozen."""
    x, dim = call.args[:2]
    out = call.outputs()[0]
    labels = flow.get(x)
    dim %= x.dim()
    flow.space.freeze(labels[dim], "indexed by fixed positions")
    labels[dim] = None
    for other in call.args[2:]:
        if isinstance(other, Tensor) and other.dim() > 1:
            flow.freeze_tensor(other, "indexed by fixed positions")
            labels = [None] * x.dim()
            flow.freeze_tensor(x, "indexed by fixed positions")
    flow.set(out, labels)


@rule("index", "_unsafe_index")
def index(flow: Flow, call: Call) -> None:
    """Advanced indexing: indexed dimensions are frozen, untouched trailing ones pass."""
    x, indices = call.args[:2]
    out = call.outputs()[0]
    labels = flow.get(x)
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        flow.space.freeze(labels[d], "indexed by fixed positions")
    adjacent = used and used == list(range(used[0], used[-1] + 1))
    boolean = any(
        indices[d].dtype.is_floating_point or indices[d].dtype.__str__() == "torch.bool" for d in used
    )
    if adjacent and not boolean:
        new = out.dim() - (x.dim() - len(used))
        flow.set(out, [*labels[: used[0]], *[None] * new, *labels[used[-1] + 1 :]])
    else:
        flow.freeze_tensor(x, "indexed by fixed positions")
        flow.set(out, [None] * out.dim())


def _or_fixed(vector: Vector | None, size: int) -> Vector:
    return vector if vector is not None else np.zeros(size, np.int64)
