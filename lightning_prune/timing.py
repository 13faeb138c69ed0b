"""Which of two ways to compute the same thing takes less time, on the batch at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

#: the compiled kernel must be so much faster to be used
MARGIN = 1.03
_ROUNDS = 2


def faster(run: Callable[[bool], Any], device: torch.device) -> bool:
    """Whether ``run(True)`` takes less time than ``run(False)``, by :data:`MARGIN`; both run three times."""
    seconds: list[list[float]] = [[], []]
    for _ in range(1 + _ROUNDS):  # the first round warms up
        for compiled in (False, True):
            start = time.perf_counter()
            run(compiled)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[compiled].append(time.perf_counter() - start)
    return min(seconds[1][1:]) * MARGIN < min(seconds[0][1:])
