"""Channel labels and the relation "these must be removed together".

A *label* is an integer that names one index of one dimension of one parameter or buffer. Every tensor that flows
through the traced model carries, per dimension, either ``None`` (the size of this dimension cannot change) or an
``int64`` vector with one label per index. Label ``FIXED`` (0) marks a position that can never be removed. *Soft* labels
belong to no parameter: constants made inside ``forward`` and broadcast dimensions, which take the size of whatever they
are joined with.

:class:`LabelSpace` hands out labels and collects the equations between them; :meth:`LabelSpace.classes` solves them.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FIXED = 0

Vector = npt.NDArray[np.int64]
#: labels of one tensor: one entry per dimension
Labels = list["Vector | None"]


def connected_components(n: int, a: Vector, b: Vector) -> Vector:
    """Return for each of ``n`` nodes the smallest node of its component under the edges ``a[i] -- b[i]``.

    Hooking and pointer jumping on whole arrays: a handful of numpy passes instead of a Python loop over edges.
    """
    root = np.arange(n, dtype=np.int64)
    while True:
        low = np.minimum(root[a], root[b])
        hooked = root.copy()
        np.minimum.at(hooked, root[a], low)
        np.minimum.at(hooked, root[b], low)
        jumped = hooked[hooked]
        while not np.array_equal(jumped, hooked):
            hooked, jumped = jumped, jumped[jumped]
        if np.array_equal(jumped, root):
            return root
        root = jumped


@dataclass(frozen=True)
class Freeze:
    """Why some labels cannot be removed: ``reason`` in plain words, ``where`` the module and source line."""

    reason: str
    where: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


@dataclass
class LabelSpace:
    """Allocates labels and records equations and freezes between them. Label 0 is ``FIXED``."""

    size: int = 1
    where: str = ""
    _edges: list[tuple[Vector, Vector]] = field(default_factory=list)
    _products: list[tuple[Vector, Vector]] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    _frozen: list[Vector] = field(default_factory=list)
    _soft: list[int] = field(default_factory=list)  # starts and ends of soft ranges, rising

    def new(self, n: int) -> Vector:
        """Allocate ``n`` fresh labels."""
        start, self.size = self.size, self.size + n
        return np.arange(start, self.size, dtype=np.int64)

    def soft(self, n: int) -> Vector:
        """Allocate ``n`` soft labels."""
        labels = self.new(n)
        self._soft += [self.size - n, self.size]
        return labels

    def is_soft(self, vector: Vector) -> bool:
        """True when the vector was allocated by :meth:`soft`."""
        return bool(len(vector)) and bisect.bisect_right(self._soft, int(vector[0])) % 2 == 1

    def unite(
        self, a: Vector, b: Vector, reason: str = "joined with a tensor of fixed size", product: bool = False
    ) -> None:
        """Demand that ``a[i]`` and ``b[i]`` are removed together; a ``FIXED`` partner freezes the other.

        ``product``: because they are multiplied with each other, see :meth:`summed`.
        """
        if a.shape != b.shape:
            raise ValueError(f"labels of different shapes cannot be united: {a.shape} and {b.shape}")
        self.freeze(a[b == FIXED], reason)
        self.freeze(b[a == FIXED], reason)
        both = (a > FIXED) & (b > FIXED) & (a != b)
        if both.any():
            (self._products if product else self._edges).append((a[both], b[both]))

    def unite_all(self, labels: Vector) -> Vector:
        """Unite along the last axis; return one representative per remaining position.

        ``labels`` has shape ``[n, m]``; the result ``[n]`` holds ``FIXED`` where any of the ``m`` was fixed.
        """
        flat = labels.reshape(-1, labels.shape[-1])
        first = flat.max(axis=1) if flat.size else flat[:, 0]
        self.unite(np.repeat(first[:, None], flat.shape[1], 1).ravel(), flat.ravel())
        result = np.where((flat == FIXED).any(axis=1), FIXED, first)
        return result.reshape(labels.shape[:-1])

    def freeze(self, labels: Vector | None, reason: str, where: str | None = None) -> None:
        """Mark ``labels`` as not removable, for ``reason``; the first reason given is the one reported."""
        if labels is not None:
            real = labels[labels > FIXED]
            if real.size:
                self._frozen.append(real)
                self.freezes.append(Freeze(reason, self.where if where is None else where))

    def solve(self) -> tuple[Vector, Vector]:
        """``(root of each label, per root the number of the first freeze that hit its class or -1)``."""
        root = self._components(self._edges, self._products)
        frozen = np.full(self.size, -1, np.int64)
        for i in range(len(self._frozen) - 1, -1, -1):
            frozen[root[self._frozen[i]]] = i
        return root, frozen

    def summed(self) -> Vector:
        """Root of each label when multiplying ties nothing: two producers of one class are added to each other."""
        return self._components(self._edges)

    def _components(self, *kinds: list[tuple[Vector, Vector]]) -> Vector:
        for edges in kinds:
            if len(edges) > 1:  # one pair of long vectors from now on: solving is repeated
                edges[:] = [(np.concatenate([e[0] for e in edges]), np.concatenate([e[1] for e in edges]))]
        none = np.empty(0, dtype=np.int64)
        a, b = (np.concatenate([none, *(edges[0][side] for edges in kinds if edges)]) for side in (0, 1))
        return connected_components(self.size, a, b)

    def classes(self) -> tuple[Vector, dict[int, Freeze]]:
        """:meth:`solve` with the freezes themselves: ``(root of each label, {root: why it is frozen})``."""
        root, frozen = self.solve()
        return root, {int(r): self.freezes[frozen[r]] for r in np.flatnonzero(frozen >= 0)}
