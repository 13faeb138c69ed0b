"""Which of two ways to compute the same thing takes less time, on the batch at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: the compiled kernel must be so much faster to be used
MARGIN = 1.03
_ROUNDS = 3
#: clock cycles for which a GPU waits before it is timed, so that everything has been launched by then
_QUEUE_CYCLES = 1_000_000


def _seconds_on_cpu(run: Callable[[Any], Any], way: Any, device: torch.device) -> float:
    # With one thread its own CPU time, which other processes do not stretch.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run(way)
    return clock() - start


def _seconds_on_gpu(run: Callable[[Any], Any], way: Any, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_QUEUE_CYCLES)
        start.record()
        run(way)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def fastest(
    run: Callable[[Any], Any], ways: Sequence[Any], device: torch.device, handicap: float = 1.0
) -> Any:
    """The way whose ``run(way)`` takes least time; the first one unless another is faster by :data:`MARGIN`.

    The time of the first one counts ``handicap`` times.

    On a GPU its own time, without that of launching; the first one while a CUDA graph is captured, when nothing can be timed.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return ways[0]
    taken_by = _seconds_on_gpu if device.type == "cuda" else _seconds_on_cpu
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(1 + _ROUNDS):  # the first round warms up
        for way, taken in zip(ways, seconds, strict=True):
            taken.append(taken_by(run, way, device))
    least = [min(taken[1:]) for taken in seconds]
    least[0] *= handicap
    best = least.index(min(least))
    return ways[best] if least[best] * MARGIN < least[0] else ways[0]


def faster(run: Callable[[bool], Any], device: torch.device) -> bool:
    """Whether ``run(True)`` takes less time than ``run(False)``, by :data:`MARGIN`."""
    return bool(fastest(run, (False, True), device))
