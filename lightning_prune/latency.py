"""Latency of models: medians of many calls, candidates interleaved so that their ratio survives a noisy machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .inputs import ExampleInputs, call_model


@dataclass(frozen=True)
class Latency:
    """Distribution of the time of one call.

    Attributes:
        median: seconds.
        p10: 10th percentile, seconds.
        p90: 90th percentile, seconds.
        n: timed calls.
    """

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def from_seconds(cls, seconds: Sequence[float]) -> Latency:
        """Summarise timed calls (linear interpolation between the two nearest).

        Raises:
            ValueError: ``seconds`` is empty.
        """
        if not seconds:
            raise ValueError("at least one timed call is needed, got none")
        values = torch.tensor(sorted(seconds), dtype=torch.float64)
        p10, median, p90 = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return cls(median=median, p10=p10, p90=p90, n=len(seconds))

    @property
    def milliseconds(self) -> float:
        """The median in milliseconds."""
        return self.median * 1e3

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3f} ms (p10 {self.p10 * 1e3:.3f}, p90 {self.p90 * 1e3:.3f}, n={self.n})"


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own training flag back (they may differ)."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """So many threads of torch inside; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def _device_of(example_inputs: ExampleInputs) -> torch.device:
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(
            "example_inputs must hold at least one tensor (a tensor, a tuple or list of positional arguments or a dict "
            f"of keyword arguments), got {type(example_inputs).__name__}: {example_inputs!r:.80}"
        )
    device = tensors[0].device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency is measured on cpu or cuda, example_inputs are on {device}")
    return device


def _timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that calls its argument and returns the seconds of that call."""
    if device.type == "cuda":

        def on_cuda(call: Callable[[], object]) -> float:
            with torch.cuda.device(device):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                end.synchronize()
                return float(start.elapsed_time(end)) * 1e-3

        return on_cuda

    def on_cpu(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return on_cpu


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    warmup: int = 5,
    repeats: int = 30,
    min_seconds: float = 0.2,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several models on the same inputs, one call of each in turn, so that drift hits all of them alike.

    Models run in eval mode under ``torch.inference_mode`` and get their training flags back. On a CUDA device the time
    between two events around the call counts, on the CPU the wall time.

    Args:
        models: name -> model; all on the device of the inputs.
        example_inputs: a tensor, a tuple or list of positional arguments or a dict of keyword arguments.
        warmup: untimed calls of each model, at least 0.
        repeats: smallest number of timed calls of each model, at least 1.
        min_seconds: go on until so much time has been measured per model on average.
        threads: CPU threads of torch during the measurement; None leaves them as they are.

    Returns:
        name -> latency, in the order of ``models``.

    Raises:
        ValueError: no model, no tensor among the inputs, or a number out of range.
    """
    if not models:
        raise ValueError("models is empty: there is nothing to measure")
    if warmup < 0 or repeats < 1 or min_seconds < 0 or (threads is not None and threads < 1):
        raise ValueError(
            "warmup >= 0, repeats >= 1, min_seconds >= 0 and threads >= 1 (or None) expected, got "
            f"warmup={warmup}, repeats={repeats}, min_seconds={min_seconds}, threads={threads}"
        )
    timer = _timer(_device_of(example_inputs))
    calls: dict[str, Callable[[], object]] = {
        name: partial(call_model, model, example_inputs) for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    total = 0.0
    with evaluating(*models.values()), torch.inference_mode(), cpu_threads(threads):
        for _ in range(warmup):
            for call in calls.values():
                timer(call)
        while len(next(iter(seconds.values()))) < repeats or total < min_seconds * len(models):
            for name, call in calls.items():
                took = timer(call)
                seconds[name].append(took)
                total += took
    return {name: Latency.from_seconds(values) for name, values in seconds.items()}


def measure_latency(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    warmup: int = 5,
    repeats: int = 30,
    min_seconds: float = 0.2,
    threads: int | None = None,
) -> Latency:
    """Time one model; see :func:`compare_latency` for the arguments and errors.

    To compare models, call :func:`compare_latency` instead of this function twice: a machine is seldom equally busy
    for two measurements in a row.

    Returns:
        Latency: median, p10 and p90 in seconds and the number of timed calls.
    """
    measured = compare_latency(
        {"model": model},
        example_inputs,
        warmup=warmup,
        repeats=repeats,
        min_seconds=min_seconds,
        threads=threads,
    )
    return measured["model"]
