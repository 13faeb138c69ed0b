"""Calls that take sizes as numbers: ``reshape``, ``split``, slices, ``expand``, depthwise groups, attention's scale.

A number in such a call may come from a shape (then it is right in a smaller network by itself) or be hard-coded in
Python. Each number is a *slot*; the labels say what must stand there: the number of live labels in the slot's vector.
:func:`slots` finds the vectors during tracing, :func:`read` the numbers in a call, :func:`write` puts others in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import counts
from .labels import Labels, Vector

Slot = str
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]

_VIEW = {"reshape", "view", "expand", "broadcast_to"}
_NEW = {"new_zeros", "new_ones", "new_full", "new_empty"}
_FACTORY = {"zeros", "ones", "full", "empty"}
_SPLIT = {"split", "split_with_sizes", "chunk", "tensor_split"}
INDEXED = {"__getitem__", "__setitem__"}
_CONV = {f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)}
_INTEGER = (int, torch.SymInt)  # symbolic while a network is exported with dynamic sizes
ATTENTION = "scaled_dot_product_attention"
#: calls that take a whole shape
SHAPED = _VIEW | _NEW | _FACTORY | {"unflatten"}
#: calls that count channels, and have to count the removed ones too
COUNTING = {"layer_norm", "rms_norm", "group_norm", "mean", ATTENTION}
SIZED = SHAPED | _SPLIT | INDEXED | _CONV | COUNTING | {"narrow"}


@dataclass(frozen=True)
class SizedCall:
    """One call with numbers in it.

    Attributes:
        function: name, e.g. ``"reshape"``.
        module: the module whose ``forward`` made the call.
        ordinal: position among the calls of ``function`` during one run of that ``forward``, its submodules' included.
        where: module and source line.
        slots: per number, the labels it counts.
        labels: all labels of the tensors that go in.
        end: how many ops the trace had executed when the call returned.
    """

    function: str
    module: str
    ordinal: int
    where: str
    slots: tuple[tuple[Slot, Vector], ...]
    labels: tuple[Vector, ...] = ()
    end: int = 0


def function_name(func: Any) -> str:
    """Plain name of a torch function or tensor method."""
    return str(getattr(func, "__name__", ""))


def _shape_arguments(name: str, args: Arguments, kwargs: Keywords) -> list[Any] | None:
    """The sizes given to a view, an expansion or a constant, as one list."""
    first = 0 if name in _FACTORY else 1
    if name == "unflatten":
        given = args[2] if len(args) > 2 else kwargs.get("sizes")
    elif len(args) > first:
        given = args[first] if isinstance(args[first], (tuple, list, torch.Size)) else args[first:]
    else:
        given = kwargs.get("size", kwargs.get("shape"))
    if not isinstance(given, (tuple, list, torch.Size)) or not all(isinstance(n, _INTEGER) for n in given):
        return None
    return list(given)


def _with_shape(
    name: str, args: Arguments, kwargs: Keywords, shape: Sequence[int]
) -> tuple[Arguments, Keywords]:
    kwargs = {k: v for k, v in kwargs.items() if k not in ("size", "shape", "sizes")}
    if name == "unflatten":
        return (args[0], args[1] if len(args) > 1 else kwargs.pop("dim"), tuple(shape)), kwargs
    if name in ("full", "new_full"):
        first = 0 if name == "full" else 1
        return (*args[:first], tuple(shape), *args[first + 1 :]), kwargs
    return ((tuple(shape),) if name in _FACTORY else (args[0], tuple(shape))), kwargs


def _dim(args: Arguments, kwargs: Keywords) -> int:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    return int(dim) % args[0].dim()


def _indexed(args: Arguments) -> list[tuple[int, int, slice]] | None:
    """``(place in the index, dimension, slice)`` of every slice; None where positions are looked up by tensors."""
    x, index = args[:2]
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(p, (Tensor, list, np.ndarray)) for p in parts):
        return None
    used = sum(p is not None and p is not Ellipsis and not isinstance(p, bool) for p in parts)
    found, dim = [], 0
    for place, part in enumerate(parts):
        if part is Ellipsis:
            dim += x.dim() - used
        elif part is not None and not isinstance(part, bool):
            if isinstance(part, slice):
                found.append((place, dim, part))
            dim += 1
    return found


def slots(
    name: str, args: Arguments, kwargs: Keywords, out: Any, labels: Callable[[Tensor], Labels]
) -> list[tuple[Slot, Vector]]:
    """The labels that each number in a call counts; numbers that do not count labels are left out."""
    result: list[tuple[Slot, Vector | None]] = []
    if name in SHAPED:
        shape = _shape_arguments(name, args, kwargs)
        if shape is not None and isinstance(out, Tensor):
            first = 0
            if name == "unflatten":
                first = int(args[1] if len(args) > 1 else kwargs["dim"]) % args[0].dim()
            # an unlabelled size is one that must not change: it may have been read off a shape that does
            own = [_counted(v, n) for v, n in zip(labels(out), out.shape, strict=True)]
            result = [(str(j), own[first + j]) for j in range(len(shape))]
    elif name in _SPLIT:
        dim = _dim(args, kwargs)
        if labels(args[0])[dim] is not None:
            parts = [(labels(o)[dim], o.shape[dim]) for o in out]
            result = [(str(j), _counted(v, n)) for j, (v, n) in enumerate(parts)]
    elif name in INDEXED:
        for place, dim, part in _indexed(args) or ():
            vector = labels(args[0])[dim]
            if vector is not None and part.step in (None, 1):
                start, stop, _ = part.indices(len(vector))
                result += [(f"{place}.start", vector[:start]), (f"{place}.stop", vector[: max(start, stop)])]
    elif name == "narrow":
        x, dim, start, length = (
            args[:4] if len(args) > 3 else (args[0], kwargs["dim"], kwargs["start"], kwargs["length"])
        )
        vector = labels(x)[dim]
        if vector is not None and isinstance(start, int):
            start %= len(vector)
            result = [("start", vector[:start]), ("length", vector[start : start + length])]
    elif name in _CONV:
        x, weight, groups = args[0], args[1], _groups(args, kwargs)
        channel = 0 if x.dim() == weight.dim() - 1 else 1
        if groups > 1 and groups == x.shape[channel]:
            result = [("groups", labels(x)[channel])]
    elif name in COUNTING:
        # these numbers stay those of the dense network: they count no live label
        entering = labels(args[0])
        dims = [d for d in _counted_dims(name, args, kwargs) if entering[d] is not None]
        result = [(str(d), np.zeros(args[0].shape[d], np.int64)) for d in dims]
    return [(slot, vector) for slot, vector in result if vector is not None]


def _counted(vector: Vector | None, size: int) -> Vector:
    return np.zeros(size, np.int64) if vector is None else vector


def _is_open(size: Any) -> bool:
    return isinstance(size, int) and size == -1


def _groups(args: Arguments, kwargs: Keywords) -> int:
    return int(args[6] if len(args) > 6 else kwargs.get("groups", 1))


def _plain(kwargs: Keywords) -> Keywords:
    """Keyword arguments that the builtin functions take and ours do not."""
    return {k: v for k, v in kwargs.items() if k not in ("cudnn_enable", "cudnn_enabled")}


def _counted_dims(name: str, args: Arguments, kwargs: Keywords) -> list[int]:
    """Dimensions over which a call takes its statistics, as far as they may hold channels."""
    ndim = args[0].dim()
    if name == ATTENTION:
        return [ndim - 1]
    if name == "group_norm":
        return [1]
    if name == "mean":
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return [] if dim is None else [d % ndim for d in ([dim] if isinstance(dim, int) else dim)]
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return list(range(ndim - len(shape), ndim))


def _split_sizes(name: str, args: Arguments, kwargs: Keywords) -> list[int]:
    total = args[0].shape[_dim(args, kwargs)]
    given = (
        args[1]
        if len(args) > 1
        else next(v for k, v in kwargs.items() if k not in ("dim", "self", "input", "tensor"))
    )
    if name == "tensor_split":
        if isinstance(given, int):
            return [len(part) for part in np.array_split(np.arange(total), given)]
        cuts = [0, *[int(i) for i in given], total]
        return [b - a for a, b in itertools.pairwise(cuts)]
    if isinstance(given, (tuple, list)):
        return [int(n) for n in given]
    size = int(given) if name != "chunk" else max(1, -(-total // int(given)))
    return [min(size, total - start) for start in range(0, total, size)]


def read(name: str, args: Arguments, kwargs: Keywords, names: Sequence[Slot]) -> dict[Slot, int | None]:
    """The number in each slot of a call; None where the call leaves it open (``-1``) or does not have it."""
    if name in SHAPED:
        shape = _shape_arguments(name, args, kwargs) or []
        return {s: None if int(s) >= len(shape) or shape[int(s)] == -1 else shape[int(s)] for s in names}
    if name in _SPLIT:
        sizes = _split_sizes(name, args, kwargs)
        return {s: sizes[int(s)] if int(s) < len(sizes) else -1 for s in names}
    if name in INDEXED:
        found: dict[Slot, int | None] = {}
        for place, dim, part in _indexed(args) or ():
            start, stop, _ = part.indices(args[0].shape[dim])
            found |= {f"{place}.start": start, f"{place}.stop": max(start, stop)}
        return {s: found.get(s) for s in names}
    if name == "narrow":
        start, length = args[2:4] if len(args) > 3 else (kwargs["start"], kwargs["length"])
        return {"start": start, "length": length}
    if name in _CONV:
        return {"groups": _groups(args, kwargs)}
    if name == ATTENTION and kwargs.get("scale") is not None:
        return dict.fromkeys(names)
    return {s: args[0].shape[int(s)] for s in names}


def write(
    func: Any, name: str, args: Arguments, kwargs: Keywords, values: Mapping[Slot, int]
) -> tuple[Any, Arguments, Keywords]:
    """The same call with ``values`` in its slots. A split of any kind becomes one by explicit sizes."""
    if name in SHAPED:
        shape = _shape_arguments(name, args, kwargs) or []
        if any(int(slot) >= len(shape) for slot in values):
            raise RuntimeError(
                f"{name} got {len(shape)} sizes where tracing saw more: forward took another path"
            )
        shape = [values[str(j)] if str(j) in values and not _is_open(n) else n for j, n in enumerate(shape)]
        return func, *_with_shape(name, args, kwargs, shape)
    if name in _SPLIT:
        return torch.split, (args[0], [values[str(j)] for j in range(len(values))], _dim(args, kwargs)), {}
    if name in INDEXED:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        parts = list(index)
        for place, _, part in _indexed(args) or ():
            if f"{place}.stop" in values:
                parts[place] = slice(values[f"{place}.start"], values[f"{place}.stop"], part.step)
        return func, (args[0], tuple(parts), *args[2:]), kwargs
    if name == "narrow":
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return func, (args[0], dim, values["start"], values["length"]), {}
    if name in _CONV:
        kwargs = {k: v for k, v in kwargs.items() if k != "groups"}
        if len(args) > 6:
            return func, (*args[:6], values["groups"], *args[7:]), kwargs
        return func, args, kwargs | {"groups": values["groups"]}
    if name == ATTENTION:
        return func, args, kwargs | {"scale": float(next(iter(values.values()))) ** -0.5}
    if name == "mean":
        dim, keepdim = (
            args[1] if len(args) > 1 else kwargs["dim"],
            args[2] if len(args) > 2 else kwargs.get("keepdim", False),
        )
        return counts.mean, (args[0], dim, keepdim), {"counts": {int(d): n for d, n in values.items()}}
    if name == "group_norm":
        return counts.group_norm, args, _plain(kwargs) | {"count": values["1"]}
    count = 1
    for d in _counted_dims(name, args, kwargs):
        count = count * values.get(str(d), args[0].shape[d])
    return getattr(counts, name), args, _plain(kwargs) | {"count": count}
