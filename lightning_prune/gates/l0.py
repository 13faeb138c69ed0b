"""Hard-concrete gates (Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization")."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGraph
from .base import Gates, learned

GAMMA, ZETA = -0.1, 1.1


def hard_concrete(u: Tensor, log_alpha: Tensor, beta: float) -> Tensor:
    """Sample ``clip(sigmoid((log u - log(1-u) + log_alpha) / beta) * (zeta - gamma) + gamma, 0, 1)`` (eq. 10, 11)."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def probability_nonzero(log_alpha: Tensor, beta: float) -> Tensor:
    """``P(z != 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))`` (eq. 12)."""
    return torch.sigmoid(log_alpha - beta * math.log(-GAMMA / ZETA))


@learned("l0")
class L0Gates(Gates):
    """Random gates ``z`` in [0, 1] with a learned probability of being exactly zero, and that probability as penalty.

    The source article's variations are options. Noise is drawn once per optimizer step and is the same for all consumers
    of a channel; validation uses the deterministic gate.

    Args:
        model: see :class:`Gates`.
        graph: see :class:`Gates`.
        trainable: see :class:`Gates`.
        lr: see :class:`Gates`.
        snap_threshold: on the deterministic gate, which is exactly 0 where ``P(z != 0) < 0.31``.
        steps: see :class:`Gates`; length of the annealing.
        init: starting ``log alpha``; about 2.5, since starting low ruins a trained network.
        beta: temperature at the start.
        beta_end: temperature at the end of learning, reached linearly; None keeps ``beta``.
        parametrization: ``"log"`` learns ``log alpha``; ``"raw"`` learns ``alpha`` itself (starting at ``exp(init)``, the
            penalty through the same ``P``).
        penalty: ``"hard_sigmoid"`` replaces ``P`` in the penalty by a straight line for ``log alpha`` in [-4, 4], which
            pushes equally everywhere; ``"exact"`` uses ``P``.
        polarize: strength of a push away from ``P = 1/2``, relative to the penalty.
        binary: channels that stay are folded as 1, as in the source article; otherwise as the deterministic gate's value,
            which can be so small that a thin network dies.
        seed: of the noise.
    """

    span = 5.0

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        trainable: Tensor,
        lr: float,
        snap_threshold: float = 0.02,
        steps: int = 1,
        *,
        init: float = 2.5,
        beta: float = 2 / 3,
        beta_end: float | None = None,
        parametrization: Literal["log", "raw"] = "log",
        penalty: Literal["hard_sigmoid", "exact"] = "hard_sigmoid",
        polarize: float = 0.0,
        binary: bool = True,
        seed: int = 0,
    ) -> None:
        if beta <= 0 or (beta_end is not None and beta_end <= 0):
            raise ValueError(f"beta and beta_end must be positive; got {beta!r} and {beta_end!r}")
        for argument, value, options in (
            ("parametrization", parametrization, ("log", "raw")),
            ("penalty", penalty, ("hard_sigmoid", "exact")),
        ):
            if value not in options:
                raise ValueError(f"{argument} must be one of {', '.join(options)}; got {value!r}")
        self.init, self.beta_start, self.beta_end = init, beta, beta if beta_end is None else beta_end
        self.raw, self.hard = parametrization == "raw", penalty == "hard_sigmoid"
        self.polarize, self.binary, self.seed = polarize, binary, seed
        super().__init__(model, graph, trainable, lr, snap_threshold, steps)
        self.done = torch.zeros((), dtype=torch.int64)
        self.draw()

    def build(self) -> dict[str, nn.Parameter]:
        """``log alpha``, or ``alpha``."""
        start = math.exp(self.init) if self.raw else self.init
        self.alpha = nn.Parameter(torch.full(self.trainable.shape, start, device=self.trainable.device))
        return {"alpha": self.alpha}

    @property
    def beta(self) -> float:
        """Temperature of the present step."""
        progress = min(1.0, int(self.done) / max(self.steps, 1))
        return self.beta_start + (self.beta_end - self.beta_start) * progress

    def log_alpha(self) -> Tensor:
        """``log alpha``, whatever is learned."""
        return self.alpha.clamp_min(1e-6).log() if self.raw else self.alpha

    def draw(self) -> None:
        """Uniform noise from the step's own seed: the same on every rank and after a resume."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.done))
        uniform = torch.rand(self.trainable.shape, generator=generator)
        self._noise = uniform.clamp(1e-6, 1 - 1e-6).to(self.trainable.device)

    def multipliers(self, training: bool = True) -> Tensor:
        """A sample while training, ``clip(1.2 sigmoid(log alpha) - 0.1, 0, 1)`` otherwise; 1 where nothing is gated."""
        log_alpha = self.log_alpha()
        if training:
            z = hard_concrete(self._noise, log_alpha, self.beta)
        else:
            z = (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
        return torch.where(self.dead, 0.0, torch.where(self.trainable, z, 1.0))

    def final(self) -> Tensor:
        """The deterministic gate, or 1 for every channel that stays."""
        if self.binary:
            return torch.ones_like(self.alpha.detach())
        return self.multipliers(training=False).detach()

    def saliency(self) -> Tensor:
        """``P(z != 0)``."""
        return torch.where(self.dead, 0.0, probability_nonzero(self.log_alpha().detach(), self.beta))

    def candidates(self) -> Tensor:
        """Channels whose deterministic gate is at or under the threshold, least probable first."""
        gates = self.multipliers(training=False).detach()
        ids = (self.trainable & ~self.dead & (gates <= self.snap_threshold)).nonzero().squeeze(1)
        return ids[torch.argsort(self.saliency()[ids], stable=True)]

    def presence(self) -> Tensor:
        """``P(z != 0)``: the controller sees the expected cost."""
        return self.saliency()

    @torch.no_grad()
    def update(self, strength: Tensor) -> None:
        """One step, then fresh noise."""
        super().update(strength)
        self.done += 1
        self.draw()

    def shrink(self, strength: Tensor, moving: Tensor) -> None:
        """Gradient step on the penalty in ``log alpha``, scaled so that the steepest slope is 1."""
        log_alpha = self.log_alpha()
        if self.hard:
            slope = ((log_alpha > -4) & (log_alpha < 4)).float()
        else:
            p = probability_nonzero(log_alpha, self.beta)
            slope = 4 * p * (1 - p)
        step = strength * slope
        if self.polarize:
            p = probability_nonzero(log_alpha, self.beta)
            step = step - self.polarize * strength * 4 * p * (1 - p) * (2 * p - 1)
        # clamped as in the reference implementation: beyond, no gradient ever comes back
        lower = (log_alpha - self.lr * step).clamp(-4.6, 4.6)
        self.alpha.copy_(lower.exp() if self.raw else lower)

    def zero(self, channels: Tensor) -> None:
        """``log alpha`` at its lower clamp."""
        self.alpha[channels] = math.exp(-4.6) if self.raw else -4.6

    def tensors(self) -> dict[str, Tensor]:
        """The step count drives annealing and noise."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of ``state_dict``; the noise is that of the restored step."""
        super().load_state_dict(state)
        self.draw()
