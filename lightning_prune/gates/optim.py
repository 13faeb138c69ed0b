"""The optimizer of gates whose gradients must stay comparable with one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SharedScaleAdam(torch.optim.Optimizer):
    """Adam with one second moment for all elements of a parameter.

    Adam divides every element's gradient by its own size, so that all gates pull equally hard and only their
    signal-to-noise ratio is left: a channel whose loss would cost ten times as much looks like any other. With one scale
    for all, steps stay proportional to the gradients, and remain independent of the scale of the loss. One second moment per
    block of parameters is what Zhang et al. 2024 ("Adam-mini", arXiv:2406.16793, algorithm 1) found to suffice.

    Args:
        params: parameters, each with a scale of its own.
        lr: step of an element whose mean gradient is as large as the root mean square of all.
        betas: decay of the mean gradient and of the mean square.
        clip: no element moves further than ``clip * lr`` in a step.
        eps: added to the root mean square.

    Elements whose gradient is exactly zero (dead channels) neither move by themselves nor count in the mean square.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        clip: float = 4.0,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "clip": clip, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients present; a closure is not supported."""
        if closure is not None:
            raise ValueError("SharedScaleAdam.step takes no closure")
        for group in self.param_groups:
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad, state = parameter.grad, self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
                state["step"] += 1
                done = float(state["step"])
                state["mean"].lerp_(grad, 1 - fast)
                size = grad.square().sum() / (grad != 0).sum().clamp_min(1)
                state["square"].lerp_(size, 1 - slow)
                scale = (state["square"] / (1 - slow**done)).sqrt() + group["eps"]
                update = state["mean"] / (1 - fast**done) / scale
                parameter.sub_(update.clamp(-group["clip"], group["clip"]), alpha=group["lr"])
