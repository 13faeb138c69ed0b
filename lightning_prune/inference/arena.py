"""Memory for maps that take each other's place."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Slot:
    half: int = 0  # floats on either side of its middle
    taken: bool = False


class Arena(Generic[Key]):
    """Places for maps of known lifetime.

    The arena consists of slots, and all maps of a slot have the same middle: the first of two threads writes below it and
    the second one above, whatever the map. So each overwrites what lies in its own cache, and need not fetch it from the
    other's.

    Args:
        align: floats; every map begins at a multiple of it.

    Example:
        >>> arena = Arena(16)
        >>> arena.take("first", 100)
        >>> arena.take("second", 40)
        >>> arena.free("first")
        >>> arena.take("third", 60)  # in the place of the first
        >>> arena.places()
        ({'first': 0, 'second': 128, 'third': 32}, 192)
    """

    def __init__(self, align: int) -> None:
        self._align = align
        self._slots: list[_Slot] = []
        self._maps: dict[Key, tuple[_Slot, int]] = {}

    def take(self, key: Key, floats: int) -> None:
        """From now on there is a map of this size."""
        half = -(-floats // (2 * self._align)) * self._align
        free = [slot for slot in self._slots if not slot.taken]
        if not free:
            free = [_Slot()]
            self._slots += free
        # the tightest that is large enough, else the one that has to grow least
        slot = min(free, key=lambda s: (s.half < half, abs(s.half - half)))
        slot.half, slot.taken = max(slot.half, half), True
        self._maps[key] = slot, half

    def free(self, key: Key) -> None:
        """Nobody reads the map any more; what was never taken is ignored."""
        if key in self._maps:
            self._maps[key][0].taken = False

    def places(self) -> tuple[dict[Key, int], int]:
        """Where each map begins, and how large the arena is, in floats."""
        middle, size = {}, 0
        for slot in self._slots:
            middle[id(slot)] = size + slot.half
            size += 2 * slot.half
        return {key: middle[id(slot)] - half for key, (slot, half) in self._maps.items()}, size


__all__ = ["Arena"]
