"""State of one trace: the labels of every live tensor, and what happened to them op by op."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .calls import SizedCall
from .labels import FIXED, Labels, LabelSpace, Vector

_LIBRARY_FRAMES = ("/torch/", "/lightning_prune/channels/", "/lightning_prune/compaction/")


@dataclass(frozen=True)
class Contraction:
    """One convolution or matrix product: ``macs = coefficient * prod(size of each axis)``."""

    module: str
    coefficient: float
    axes: tuple[Vector, ...]
    inputs: Vector | None
    gateable: bool


@dataclass(frozen=True)
class Step:
    """One executed op, with the labels that went in and came out (for attributing a failed trial compaction)."""

    name: str
    module: str
    line: str
    inputs: tuple[tuple[Vector | None, ...], ...]
    outputs: tuple[tuple[Vector | None, ...], ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Flow:
    """Labels of all tensors seen so far. Rules read with :meth:`get` and write with :meth:`set`.

    ``steps`` are the executed ops, ``calls`` the Python-level calls with sizes in them, ``hard`` those whose sizes
    turned out wrong in a thinned copy: ``{index of the call: slots}``. ``producers``, ``consumers`` and ``mixed`` are
    the label vectors that come out of a contraction, go into one with a weight of the network, and into one without.
    """

    space: LabelSpace = field(default_factory=LabelSpace)
    contractions: list[Contraction] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    calls: list[SizedCall] = field(default_factory=list)
    hard: dict[int, set[str]] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    producers: list[Vector] = field(default_factory=list)
    consumers: list[Vector] = field(default_factory=list)
    mixed: list[Vector] = field(default_factory=list)
    _labels: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _origin: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _registered: dict[str, Labels] = field(default_factory=dict)
    _storages: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Name of the submodule being executed."""
        return self.stack[-1] if self.stack else ""

    def where(self, line: str) -> str:
        """The executing module and ``line``, as one text."""
        return ", ".join(part for part in (self.module, line) if part)

    def register(self, name: str, tensor: Tensor, labels: Labels) -> None:
        """Introduce a parameter or buffer."""
        self._labels[tensor] = labels
        self._origin[tensor] = name
        self._registered[name] = labels
        self._storages[_storage_key(tensor)] = tensor

    def get(self, tensor: Tensor) -> Labels:
        """Labels of ``tensor``; all ``None`` for network inputs and anything made outside the traced ops."""
        found = self._labels.get(tensor)
        if found is None:
            # `parameter.data` is a new object that never went through an op: recognise it by its memory
            known = self._storages.get(_storage_key(tensor))
            if known is None:
                return [None] * tensor.dim()
            tensor, found = known, self._labels[known]
        name = self._origin.get(tensor)
        if name is not None:
            self.touched.add(name)
        return list(found)

    def own_labels(self, name: str) -> Labels:
        """The labels given to a parameter or buffer at the start."""
        return self._registered[name]

    def origin(self, tensor: Tensor) -> str | None:
        """Name of the parameter or buffer that ``tensor`` is, or is a view of."""
        found = self._origin.get(tensor)
        if found is None:
            known = self._storages.get(_storage_key(tensor))
            found = self._origin.get(known) if known is not None else None
        return found

    def inherit(self, out: Tensor, source: Tensor) -> None:
        """Remember that ``out`` is a view of what ``source`` is."""
        name = self.origin(source)
        if name is not None:
            self._origin[out] = name

    def set(self, tensor: Tensor, labels: Sequence[Vector | None]) -> None:
        """Attach ``labels`` to an op's output. A dimension of size 1 cannot lose its only channel: frozen."""
        if len(labels) != tensor.dim():
            raise AssertionError(f"{len(labels)} label vectors for a tensor of {tensor.dim()} dimensions")
        kept: Labels = []
        for size, vector in zip(tensor.shape, labels, strict=True):
            if vector is not None and size == 1:
                self.space.freeze(vector, "a single channel picked out by its index")
                vector = None
            if vector is not None and len(vector) != size:
                raise AssertionError(f"{len(vector)} labels for a dimension of size {size}")
            kept.append(vector if vector is not None and (vector != FIXED).any() else None)
        self._labels[tensor] = kept

    def freeze_tensor(self, tensor: Tensor, reason: str) -> None:
        """Freeze every label of ``tensor``."""
        for vector in self.get(tensor):
            self.space.freeze(vector, reason)

    def join(self, tensors: Sequence[Tensor], shape: Sequence[int], product: bool = False) -> Labels:
        """Unite labels index by index under broadcasting to ``shape``; return the joined labels."""
        ndim = len(shape)
        joined: Labels = []
        columns: list[Labels] = [[*[None] * (ndim - t.dim()), *self.get(t)] for t in tensors]
        sizes = [[0] * (ndim - t.dim()) + list(t.shape) for t in tensors]
        for d in range(ndim):
            vectors = []
            for column, size in zip(columns, sizes, strict=True):
                vector = column[d]
                if size[d] == shape[d]:
                    vectors.append(vector if vector is not None else np.zeros(shape[d], np.int64))
                elif vector is not None:
                    self.space.freeze(vector, "one channel broadcast over others")
            joined.append(self.join_vectors(vectors, product))
        return joined

    def join_vectors(self, vectors: Sequence[Vector], product: bool = False) -> Vector | None:
        """Unite vectors of equal length position by position; ``None`` when nothing is labelled."""
        if not any((v > FIXED).any() for v in vectors):
            return None
        vectors = sorted(vectors, key=self.space.is_soft)
        result = vectors[0]
        for vector in vectors[1:]:
            if vector is not result:
                self.space.unite(result, vector, product=product)
                result = np.where(vector == FIXED, FIXED, result)
        return result

    def contraction(
        self,
        coefficient: float,
        axes: Sequence[Vector | int],
        weight: Tensor | None,
        weight_in: Vector | None,
        arriving: Vector | None,
        produced: Sequence[Vector | None] = (),
    ) -> None:
        """Record a convolution or matrix product.

        ``coefficient * prod(axes)`` are its MACs (integer axes are constant sizes). ``weight_in`` are the labels of the
        contracted dimension of ``weight``; ``arriving`` those of the activation; ``produced`` those that come out.
        """
        vectors = []
        for axis in axes:
            if isinstance(axis, int):
                coefficient *= axis
            else:
                vectors.append(axis)
        name = self.origin(weight) if weight is not None else None
        owner = (
            name.rpartition(".")[0].partition("parametrizations")[0].rstrip(".") if name is not None else None
        )
        gateable = owner is not None and owner in self.stack
        self.contractions.append(Contraction(self.module, coefficient, tuple(vectors), arriving, gateable))
        if weight_in is not None and name is not None:
            self.consumers.append(weight_in)
        elif arriving is not None:
            self.mixed.append(arriving)
        self.producers.extend(v for v in produced if v is not None)


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
    )


def source_line() -> str:
    """``file.py:line`` of the innermost frame that belongs to the user's model code, else an empty string."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if not name.startswith("<") and not any(part in name for part in _LIBRARY_FRAMES):
            return f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
