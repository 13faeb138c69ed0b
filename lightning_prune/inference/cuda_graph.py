"""A network as one CUDA graph: no launches from Python, static buffers inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

_WARMUP = 3
_CALLS = 20


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


def seconds_per_call(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median device time of each call, taken in turns.

    A round replays one graph of twenty calls in a row, or makes them from Python where they cannot be captured.

    Args:
        calls: name -> function without arguments that launches work on the current device; warmed up.
        rounds: timed rounds of each.
    """
    replays = {name: _replayed(call) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, replay in replays.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            if number > 0:  # the first replay uploads the graph
                taken[name].append(start.elapsed_time(end) * 1e-3 / _CALLS)
    return {name: median(values) for name, values in taken.items()}


def _replayed(call: Callable[[], Any]) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(_CALLS):
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            repeat()
    except RuntimeError:
        torch.cuda.synchronize()
        return repeat
    return graph.replay
