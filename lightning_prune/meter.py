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
    between does not, and asynchronous devices are measured at the rate they sustain.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._gaps: list[float] = []
        self._samples: list[int] = []
        self._started: float | None = None
        self._ended = 0.0
        self.macs = 0.0
        self.macs_dense = 0.0
        self._measured = False
        #: bytes saved for the backward pass: of the dense network, if it was seen in training, and when last measured
        self.memory_dense: int | None = None
        self.memory: int | None = None

    def epoch(self) -> None:
        """A new epoch: the pause before it is no step."""
        self._gaps, self._samples, self._started, self._measured = [], [], None, False

    def start(self, samples: int) -> None:
        """A batch of so many samples begins."""
        now = self._clock()
        if self._started is not None:
            self._gaps.append(now - self._started)
        self._started = now
        self._samples.append(samples)

    def end(self, macs: float, dense: float) -> None:
        """The batch is done; a sample's forward pass takes ``macs`` now, and ``dense`` in the dense network."""
        self._ended = self._clock()
        self.macs += TRAINING_FACTOR * macs * self._samples[-1]
        self.macs_dense += TRAINING_FACTOR * dense * self._samples[-1]

    def backward(self, loss: Tensor, parameters: Iterable[Tensor], full_size: bool) -> None:
        """The backward pass of ``loss`` is about to begin: once per epoch, see what is kept for it."""
        if not self._measured:
            self._measured = True
            self.memory = saved_for_backward(loss, parameters)
            if full_size and self.memory_dense is None:
                self.memory_dense = self.memory

    def record(self, device: torch.device) -> dict[str, float]:
        """What is logged: per epoch the time, over the fit the rest.

        Seconds per step, samples per second (of this process), the share of multiply-accumulates saved, bytes that a step keeps
        for its backward pass, and on CUDA the peak of allocated bytes.
        """
        if self._started is None:
            return {}
        step = statistics.median(self._gaps) if self._gaps else self._ended - self._started
        found = {
            "step_time": step,
            "samples_per_second": statistics.fmean(self._samples) / max(step, 1e-12),
            "saved_training_macs": self.saved,
        }
        if self.memory is not None:
            found["activation_memory"] = float(self.memory)
        if device.type == "cuda":
            found["peak_memory"] = float(torch.cuda.max_memory_allocated(device))
        return found

    def totals(self) -> dict[str, Any]:
        """What a ``PruneReport`` holds of this."""
        return {
            "training_macs": self.macs,
            "training_macs_dense": self.macs_dense,
            "activation_memory": self.memory,
            "activation_memory_dense": self.memory_dense,
        }

    @property
    def saved(self) -> float:
        """Share of the dense fit's multiply-accumulates that dead channels saved so far."""
        return 1.0 - self.macs / self.macs_dense if self.macs_dense else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Totals of the fit."""
        memory = {"memory": self.memory, "memory_dense": self.memory_dense}
        return {"macs": self.macs, "macs_dense": self.macs_dense, **memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.macs, self.macs_dense = state["macs"], state["macs_dense"]
        self.memory, self.memory_dense = state.get("memory"), state.get("memory_dense")
