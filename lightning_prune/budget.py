"""Steering a penalty to a budget, so that nobody tunes lambda."""

from __future__ import annotations

from typing import Any

RAMPS: tuple[str, ...] = ("cubic", "exponential", "linear")


def ramped_target(target: float, progress: float, shape: str = "cubic", share: float = 0.75) -> float:
    """Budget to aim at after ``progress`` (0..1) of the learn phase: from 1 down to ``target`` over ``share`` of it.

    ``"cubic"`` (Zhu and Gupta 2017) and ``"exponential"`` remove most channels early, when they are easy to spare;
    ``"linear"`` removes equally much at all times.
    """
    p = min(1.0, max(0.0, progress) / share)
    if shape == "cubic":
        return target + (1.0 - target) * (1.0 - p) ** 3
    return float(target**p) if shape == "exponential" else 1.0 - (1.0 - target) * p


class PenaltyController:
    """Turns the gap between cost and target into a penalty strength (augmented Lagrangian, Adam ascent).

    The penalty is ``multiplier * gap + quadratic * gap^2 / 2`` for the constraint ``gap = cost - target <= 0`` (costs as
    fractions of dense). Its derivative with respect to the cost, ``strength = multiplier + quadratic * gap``, multiplies
    the price of each channel. The multiplier climbs by Adam on the gap, which makes its speed independent of the gap's
    scale; it falls as soon as the target is met. Xia et al. 2022 (CoFi) steer sparsity with the same two terms.

    Args:
        lr: step size of the multiplier per optimizer step.
        quadratic: immediate response to the gap.
    """

    def __init__(self, lr: float, quadratic: float = 4.0) -> None:
        self.lr = lr
        self.quadratic = quadratic
        self.multiplier = 0.0
        self._mean = 0.0
        self._square = 0.0
        self._steps = 0

    def step(self, cost: float, target: float) -> float:
        """Move the multiplier by the gap and return the strength to apply now, at least 0."""
        gap = cost - target
        self._steps += 1
        self._mean = 0.9 * self._mean + 0.1 * gap
        self._square = 0.99 * self._square + 0.01 * gap * gap
        mean = self._mean / (1 - 0.9**self._steps)
        rms = (self._square / (1 - 0.99**self._steps)) ** 0.5
        self.multiplier = max(0.0, self.multiplier + self.lr * mean / (rms + 1e-3))
        return self.strength(cost, target)

    def strength(self, cost: float, target: float) -> float:
        """Penalty strength at the present multiplier."""
        return max(0.0, self.multiplier + self.quadratic * (cost - target))

    def state_dict(self) -> dict[str, Any]:
        """All of its state, as plain numbers."""
        return {
            name: getattr(self, name)
            for name in ("lr", "quadratic", "multiplier", "_mean", "_square", "_steps")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)
