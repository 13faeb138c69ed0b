"""Memory of gradients that is used again, and what is known of what it holds."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .ops.availability import extension_available


class ReusedMemory:
    """Memory of a weight's gradient, given out again once nobody holds it.

    Fresh memory costs a page fault every 4 KB. And what was zero before still is, unless somebody has written to it.
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._unused = 0
        # beside which live part it holds zeros, as of which version
        self._zeros: tuple[Any, ...] | None = None
        self._block: Tensor | None = None  # that live part, if anybody asks for it
        self._asked = False

    def spread(self, block: Tensor, like: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """The live part among zeros, dense, of ``like``'s shape, dtype and memory format; nobody else has its memory.

        Args:
            block: the live part, of shape [rows, columns, kh, kw].
            like: of shape [O, C, kh, kw], float32 or float64, contiguous or channels_last.
            rows: int64 indices that live, sorted; None for all.
            columns: likewise.
        """
        own = self._tensor
        if own is None or own.shape != like.shape or own.stride() != like.stride() or own.dtype != like.dtype:
            own = self._tensor = torch.empty_like(like)
            self._unused, self._zeros = _holders(own), None
            _BY_PLACE[own.data_ptr()] = self
        elif _holders(own) != self._unused:
            whole = torch.empty_like(like)
            with torch._C._AutoDispatchBelowAutograd():
                _SPREAD(block, whole, rows, columns)
            return whole
        zeros = self._zeros
        clean = zeros is not None and zeros[0] is rows and zeros[1] is columns and zeros[2] == own._version
        with torch._C._AutoDispatchBelowAutograd():
            _SPREAD(block, own, rows, columns, not clean)
        self._zeros = rows, columns, own._version
        self._block = block if self._asked else None
        return own.detach()

    @staticmethod
    def live_part(grad: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
        """What :meth:`spread` has made ``grad`` of, once, if nobody has written to ``grad`` since; else None.

        Kept from the second call on. ``rows`` and ``columns`` have the same numbers as those it was made with, or it is None.
        """
        memory = _BY_PLACE.get(grad.data_ptr())
        if memory is None:
            return None
        memory._asked = True
        own, block, zeros, memory._block = memory._tensor, memory._block, memory._zeros, None
        if block is None or own is None or zeros is None or zeros[2] != own._version:
            return None
        if grad.shape != own.shape or grad.stride() != own.stride() or grad.dtype != own.dtype:
            return None
        if not (same_indices(rows, zeros[0]) and same_indices(columns, zeros[1])):
            return None
        # Loss scalers multiply gradients without a new version.
        return block if _IS_PART(grad, block, rows, columns) else None


def same_indices(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two lists have the same numbers; None is all of them."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _holders(tensor: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


_SPREAD: Any = torch.ops.lightning_prune.spread_block.default if extension_available() else None
_IS_PART: Any = torch.ops.lightning_prune.is_live_part.default if extension_available() else None
#: address -> whose memory it is
_BY_PLACE: WeakValueDictionary[int, ReusedMemory] = WeakValueDictionary()
