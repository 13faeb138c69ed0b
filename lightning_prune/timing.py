"""Which of two ways to compute the same thing takes less time, on the batch at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: the compiled kernel must be so much faster to be used
MARGIN = 1.03
_ROUNDS = 3


def fastest(run: Callable[[Any], Any], ways: Sequence[Any], device: torch.device) -> Any:
    """The way whose ``run(way)`` takes least time; the first one unless another is faster by :data:`MARGIN`."""
    # With one thread its own CPU time, which other processes do not stretch.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(1 + _ROUNDS):  # the first round warms up
        for way, taken in zip(ways, seconds, strict=True):
            start = clock()
            run(way)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(clock() - start)
    least = [min(taken[1:]) for taken in seconds]
    best = least.index(min(least))
    return ways[best] if least[best] * MARGIN < least[0] else ways[0]


def faster(run: Callable[[bool], Any], device: torch.device) -> bool:
    """Whether ``run(True)`` takes less time than ``run(False)``, by :data:`MARGIN`."""
    return bool(fastest(run, (False, True), device))
