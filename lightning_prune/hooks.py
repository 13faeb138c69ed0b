"""Hooks that stay with their module: copies and pickles get one that does nothing in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _nothing(*unused: Any, **unused_too: Any) -> None:
    """What a copied or unpickled module has in place of the hook."""


def _make_nothing() -> Callable[..., None]:
    return _nothing


class PrivateHook:
    """A hook that does not go along when its module is copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _make_nothing, ()
