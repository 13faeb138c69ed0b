"""A network as one CUDA graph: no launches from Python, static buffers inside."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

_WARMUP = 3


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must agree for a captured graph to serve a call: structure, shapes, dtypes, strides, constants."""
    leaves, spec = tree_flatten((args, dict(kwargs)))
    return (
        spec,
        *(
            (tuple(leaf.shape), leaf.dtype, leaf.stride(), leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ),
    )


class CapturedCall:
    """One forward call with fixed shapes, captured and replayed.

    Results are copies, so they stay as they are when the next call comes. Calls take turns under a lock.

    Args:
        network: on CUDA, in evaluation mode; its weights may change in place, not move.
        args: tensors on CUDA and constants.
        kwargs: likewise.

    Raises:
        RuntimeError: something in the network cannot be captured.
    """

    def __init__(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.signature = signature(args, kwargs)
        self._lock = threading.Lock()
        with torch.inference_mode(False), torch.no_grad():  # buffers that any later call may write
            self._inputs = tree_map(_copied, (args, dict(kwargs)))
            given, named = self._inputs
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUP):
                    network(*given, **named)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._outputs = network(*given, **named)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Replay on new inputs of the same signature."""
        fresh, _ = tree_flatten((args, dict(kwargs)))
        static, _ = tree_flatten(self._inputs)
        with self._lock, torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
            self._graph.replay()
            return tree_map(_copied, self._outputs)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
