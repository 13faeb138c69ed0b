"""What training costs: time per step, samples per second, multiply-accumulates, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .memory import saved_for_backward

#: multiply-accumulates of one training step over those of its forward pass: the backward pass computes the gradients of
#: the inputs and of the weights, each as expensive as the forward pass
TRAINING_FACTOR = 3.0


class TrainingMeter:
    """Counts samples, steps and multiply-accumulates of this process.

    Step times are medians from one batch's start to the next within an epoch: data loading counts, a validation run in
    between does not (:meth:`pause`), and asynchronous devices are measured at the rate they sustain.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._dense_steps: list[float] = []
        self._dense_peak: int | None = None
        self._peak: int | None = None
        self._step: float | None = None
        self._rate: float | None = None
        self.macs = 0.0
        self.macs_dense = 0.0
        #: from each epoch's first batch to the end of its last, without validation
        self.seconds = 0.0
        #: bytes saved for the backward pass: of the dense network, if it was seen in training, and when last measured
        self.memory_dense: int | None = None
        self.memory: int | None = None
        self.epoch()

    def epoch(self, device: torch.device | None = None) -> None:
        """A new epoch: the pause before it is no step, and peaks before it do not count."""
        self._gaps: list[float] = []
        self._samples: list[int] = []
        self._measured, self._dense, self._single = False, True, 0.0
        self.pause()
        if device is not None and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def pause(self) -> None:
        """Something else than training comes next."""
        self._started: float | None = None
        self._ended: float | None = None

    def start(self, samples: int) -> None:
        """A batch of so many samples begins."""
        now = self._clock()
        if self._started is not None:
            self._gaps.append(now - self._started)
        if self._ended is not None:  # loading the batch took this long
            self.seconds += now - self._ended
        self._started = now
        self._samples.append(samples)

    def end(self, macs: float, dense: float, unpruned: bool = False) -> None:
        """The batch is done; a sample's forward pass takes ``macs`` now, and ``dense`` in the dense network.

        ``unpruned``: this was the dense network, without gates.
        """
        self._ended = self._clock()
        assert self._started is not None
        self._single = self._ended - self._started
        self.seconds += self._single
        self._dense &= unpruned
        self.macs += TRAINING_FACTOR * macs * self._samples[-1]
        self.macs_dense += TRAINING_FACTOR * dense * self._samples[-1]

    def backward(self, loss: Tensor, parameters: Iterable[Tensor], nothing_dead: bool) -> None:
        """The backward pass of ``loss`` is about to begin: once per epoch, see what is kept for it."""
        if not self._measured:
            self._measured = True
            self.memory = saved_for_backward(loss, parameters)
            if nothing_dead and self.memory_dense is None:
                self.memory_dense = self.memory

    def record(self, device: torch.device) -> dict[str, float]:
        """What is logged: per epoch the time, over the fit the rest.

        Seconds per step, samples per second (of this process), the share of multiply-accumulates saved, bytes that a step keeps
        for its backward pass, and on CUDA the epoch's peak of allocated bytes.
        """
        if not self._samples:
            return {}
        self._step = statistics.median(self._gaps) if self._gaps else self._single
        self._rate = statistics.fmean(self._samples) / max(self._step, 1e-12)
        found = {
            "step_time": self._step,
            "samples_per_second": self._rate,
            "saved_training_macs": self.saved,
        }
        if self._dense:
            self._dense_steps.append(self._step)
        if self.memory is not None:
            found["activation_memory"] = float(self.memory)
        if device.type == "cuda":
            self._peak = int(torch.cuda.max_memory_allocated(device))
            found["peak_memory"] = float(self._peak)
            if self._dense and self._dense_peak is None:
                self._dense_peak = self._peak
        return found

    def totals(self) -> dict[str, Any]:
        """What a ``PruneReport`` holds of this."""
        return {
            "training_macs": self.macs,
            "training_macs_dense": self.macs_dense,
            "activation_memory": self.memory,
            "activation_memory_dense": self.memory_dense,
            "peak_memory": self._peak,
            "peak_memory_dense": self._dense_peak,
            "step_time": self._step,
            "step_time_dense": statistics.median(self._dense_steps) if self._dense_steps else None,
            "samples_per_second": self._rate,
            "training_seconds": self.seconds,
        }

    @property
    def saved(self) -> float:
        """Share of the dense fit's multiply-accumulates that were not computed so far."""
        return 1.0 - self.macs / self.macs_dense if self.macs_dense else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Totals of the fit."""
        state = {
            name: getattr(self, name) for name in ("macs", "macs_dense", "memory", "memory_dense", "seconds")
        }
        return {**state, "dense_steps": list(self._dense_steps), "dense_peak": self._dense_peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.macs, self.macs_dense = state["macs"], state["macs_dense"]
        self.memory, self.memory_dense = state.get("memory"), state.get("memory_dense")
        self.seconds, self._dense_peak = state.get("seconds", 0.0), state.get("dense_peak")
        self._dense_steps = list(state.get("dense_steps", ()))
