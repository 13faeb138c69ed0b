"""Timing: interleaved samples of many calls over rotating buffers, captured in a CUDA graph where there is one.

A sample is the time of one pass over all buffers, divided by their number. Candidates take turns, and the whole is done
twice: the difference between the two medians of the same candidate is the noise floor, below which nothing is a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_prune.latency import Latency

#: together the buffers should be so much larger than the L2 cache
BEYOND_CACHE = 2.0
MAX_BUFFERS = 256


def buffers_needed(bytes_per_call: float, cache_bytes: float) -> int:
    """How many sets of tensors to rotate among, so that a call finds none of its own in the cache."""
    if bytes_per_call <= 0:
        raise ValueError(f"bytes_per_call must be positive, got {bytes_per_call}")
    return max(2, min(MAX_BUFFERS, int(-(-BEYOND_CACHE * cache_bytes // bytes_per_call)) + 1))


@dataclass
class Timed:
    """Both series of one candidate, seconds per call."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return Latency.from_seconds(self.first + self.second).median

    @property
    def noise(self) -> float:
        """Relative difference between the medians of the two series."""
        a, b = Latency.from_seconds(self.first).median, Latency.from_seconds(self.second).median
        return abs(a - b) / min(a, b)

    def as_row(self) -> dict[str, Any]:
        every = Latency.from_seconds(self.first + self.second)
        return {
            "median_us": every.median * 1e6,
            "p10_us": every.p10 * 1e6,
            "p90_us": every.p90 * 1e6,
            "noise": self.noise,
            "samples_us": [[round(s * 1e6, 4) for s in series] for series in (self.first, self.second)],
        }


Sampler = Callable[[], float]


def interleaved(
    samplers: Mapping[str, Sampler], samples: int = 10, min_seconds: float = 0.01, max_seconds: float = 0.5
) -> dict[str, Timed]:
    """Two series of samples of every candidate, in turns.

    Each series has at least ``samples`` samples per candidate and at least ``min_seconds`` of measured time per
    candidate on average, unless ``max_seconds`` per candidate are over (then at least three).
    """
    timed = {name: Timed() for name in samplers}
    for sampler in samplers.values():
        sampler()
    for series in ("first", "second"):
        total, rounds, start = 0.0, 0, time.monotonic()
        while rounds < samples or total < min_seconds * len(samplers):
            if rounds >= 3 and time.monotonic() - start > max_seconds * len(samplers):
                break
            for name, sampler in samplers.items():
                took = sampler()
                getattr(timed[name], series).append(took)
                total += took
            rounds += 1
    return timed


class Loop:
    """One pass of ``call`` over all argument tuples; on CUDA as one graph, unless ``graph`` is false.

    Outputs of a captured pass are all kept, so that they rotate like the inputs.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        arguments: Sequence[tuple[Tensor, ...]],
        graph: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.call, self.arguments, self.clock = call, list(arguments), clock
        self.cuda = self.arguments[0][0].is_cuda
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            for given in self.arguments[:3]:  # compiles, chooses algorithms
                call(*given)
            if self.cuda and graph:
                self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.call(*self.arguments[0])
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._kept = [self.call(*given) for given in self.arguments]
        self._graph.replay()
        torch.cuda.synchronize()

    def _pass(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for given in self.arguments:
            self.call(*given)

    def sample(self) -> float:
        """Seconds per call of one pass."""
        with torch.no_grad():
            if not self.cuda:
                start = self.clock()
                self._pass()
                return (self.clock() - start) / len(self.arguments)
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            self._pass()
            end_event.record()
            end_event.synchronize()
            return start_event.elapsed_time(end_event) * 1e-3 / len(self.arguments)


def warm_up(device: str, seconds: float = 0.3) -> None:
    """Bring the clocks of a GPU up from idle."""
    if device != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; on a CPU a token value, since buffers there only exercise the code."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 16
