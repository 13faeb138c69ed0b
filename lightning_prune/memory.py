"""How much memory a training step keeps for its backward pass, on any device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def saved_for_backward(loss: Tensor, without: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that the graph behind ``loss`` keeps for ``backward``; each counts once.

    Storages of ``without`` (the parameters) do not count. The graph is walked and nothing is computed: checkpointed layers,
    which save next to nothing, are not run again, and what hooks have packed counts as they packed it. What a custom function
    keeps in attributes of its own is not seen.
    """
    mine = {tensor.untyped_storage().data_ptr() for tensor in without}
    storages: dict[int, int] = {}
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in _names(type(node)):
            for tensor in _tensors(node, name):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in mine:
                    storages[storage.data_ptr()] = storage.nbytes()
        stack.extend(function for function, _ in node.next_functions)
    return sum(storages.values())


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved"))


def _tensors(node: Any, name: str) -> list[Tensor]:
    try:
        saved = tree_leaves(getattr(node, name))
        packed = [leaf for value in saved if value is not None for leaf in tree_leaves(value.data)]
    except RuntimeError:  # freed by an earlier backward pass
        return []
    return [leaf for leaf in packed if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
