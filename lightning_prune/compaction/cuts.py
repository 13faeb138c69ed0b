"""What a plan does to single tensors, and how to undo it: slices, and slices filled up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .apply import zeroed_slices
from .formats import laid_out
from .plan import CompactionPlan


@dataclass(frozen=True)
class Cut:
    """Positions that go from one tensor, and come back.

    Attributes:
        shape: of the dense tensor.
        narrow_shape: of what is left.
        kept: per dimension that is cut, int64 positions that are left, and what is filled in for the others.
        memory_format: of the dense tensor; what is left has it too.
    """

    shape: tuple[int, ...]
    narrow_shape: tuple[int, ...]
    kept: tuple[tuple[int, Tensor, float], ...]
    memory_format: torch.memory_format = torch.contiguous_format

    def narrow(self, tensor: Tensor) -> Tensor:
        """What is left of a ``tensor`` of the dense shape: new memory."""
        for dim, keep, _ in self.kept:
            tensor = tensor.index_select(dim, keep.to(tensor.device))
        return self._laid(tensor)

    def widen(self, tensor: Tensor, *, values: bool = True) -> Tensor:
        """The dense tensor around a narrow one: new memory.

        Zeros around it; with ``values`` ones where a zero has no meaning (running variances, directions of weight
        normalisation), which is for parameters and buffers and not for what an optimizer remembers of them.
        """
        for dim, keep, fill in sorted(self.kept, key=lambda piece: -piece[2]):
            shape = [*tensor.shape[:dim], self.shape[dim], *tensor.shape[dim + 1 :]]
            wide = tensor.new_full(shape, fill if values else 0.0)
            tensor = wide.index_copy_(dim, keep.to(tensor.device), tensor)
        return self._laid(tensor)

    def narrow_state(self, tensor: Tensor) -> Tensor:
        """:meth:`narrow` for what an optimizer remembers; unchanged unless it has the dense shape."""
        return self.narrow(tensor) if tuple(tensor.shape) == self.shape else tensor

    def widen_state(self, tensor: Tensor) -> Tensor:
        """:meth:`widen` for what an optimizer remembers; unchanged unless it has the narrow shape."""
        return self.widen(tensor, values=False) if tuple(tensor.shape) == self.narrow_shape else tensor

    def _laid(self, tensor: Tensor) -> Tensor:
        return laid_out(tensor, self.memory_format)


def cuts_of(
    plan: CompactionPlan, memory_formats: Mapping[str, torch.memory_format] | None = None
) -> dict[str, Cut]:
    """By name, what ``plan`` cuts out of each tensor; dense tensors are contiguous unless ``memory_formats`` says otherwise."""
    formats = memory_formats or {}
    zeroed = set(zeroed_slices(plan))
    pieces: dict[str, list[tuple[int, Tensor, float]]] = {}
    for piece in plan.slices:
        keep = torch.ones(piece.size, dtype=torch.bool)
        keep[list(piece.removed)] = False
        fill = 0.0 if piece in zeroed else 1.0
        pieces.setdefault(piece.tensor, []).append((piece.dim, keep.nonzero().squeeze(1), fill))
    found = {}
    for name, kept in pieces.items():
        narrow = list(plan.tensors[name])
        for dim, keep, _ in kept:
            narrow[dim] = len(keep)
        found[name] = Cut(
            tuple(plan.tensors[name]), tuple(narrow), tuple(kept), formats.get(name, torch.contiguous_format)
        )
    return found
