"""Variational information bottleneck (Dai, Zhu, Guo, Wipf 2018, "Compressing Neural Networks using the VIB")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Gates, learned


def kl_divergence(mu: Tensor, log_sigma2: Tensor) -> Tensor:
    """``0.5 * log(1 + mu^2 / sigma^2)`` per channel (eq. 10): what a channel costs in bits of its input."""
    return 0.5 * torch.log1p(mu.square() / (log_sigma2.exp() + 1e-8))


@learned("vib")
class VIBGates(Gates):
    """``z = mu + eps * sigma`` per channel; a channel whose noise drowns it is removed: keep iff ``log sigma^2 < log mu^2``.

    Noise is drawn per sample, as in the paper: gates act on the consumers' inputs.
    """

    def build(self) -> dict[str, nn.Parameter]:
        """``mu = 1`` and ``log sigma^2 = -9``, the official initialisation."""
        shape, device = self.trainable.shape, self.trainable.device
        self.mu = nn.Parameter(torch.ones(shape, device=device))
        self.log_sigma2 = nn.Parameter(torch.full(shape, -9.0, device=device))
        return {"mu": self.mu, "log_sigma2": self.log_sigma2}

    def attach(self) -> None:
        """Hang the gates on the consumers' inputs."""
        self._hooks.attach(per_sample=lambda batch: self.without_resting(self.samples(batch)))

    def samples(self, batch: int) -> Tensor:
        """One draw per sample, shape [batch, num_channels]."""
        noise = torch.randn(batch, *self.mu.shape, device=self.mu.device)
        z = self.mu + noise * (0.5 * self.log_sigma2).exp()
        return torch.where(self.dead, 0.0, torch.where(self.trainable, z, 1.0))

    def multipliers(self, training: bool = True) -> Tensor:
        """``mu``: the evaluation gate."""
        return torch.where(self.dead, 0.0, torch.where(self.trainable, self.mu, 1.0))

    def log_alpha(self) -> Tensor:
        """``log sigma^2 - log mu^2``, negative for channels that stay."""
        return self.log_sigma2.detach() - torch.log(self.mu.detach().square() + 1e-8)

    def saliency(self) -> Tensor:
        """The divergence: channels that carry nothing have none."""
        return torch.where(self.dead, 0.0, kl_divergence(self.mu.detach(), self.log_sigma2.detach()))

    def presence(self) -> Tensor:
        """1 for clear channels, falling to 0 where the noise reaches the signal (``log alpha`` from -4 to 0)."""
        return torch.where(self.dead, 0.0, (-self.log_alpha() / 4).clamp(0.0, 1.0))

    def candidates(self) -> Tensor:
        """Channels past the paper's rule, noisiest first."""
        ratio = self.log_alpha()
        ids = (self.trainable & ~self.dead & (ratio >= 0)).nonzero().squeeze(1)
        return ids[torch.argsort(-ratio[ids], stable=True)]

    def shrink(self, strength: Tensor, moving: Tensor) -> None:
        """Gradient step on ``strength * KL``: the noise grows and the signal falls.

        ``d KL / d log sigma^2 = -r / 2`` and ``d KL / d mu = r / mu`` with ``r = mu^2 / (mu^2 + sigma^2)``. ``log sigma^2``
        has 9 units to travel where ``mu`` has 1, so its step is that much longer.
        """
        r = self.mu.square() / (self.mu.square() + self.log_sigma2.exp())
        push = self.lr * strength
        self.log_sigma2.add_(9.0 * push * 0.5 * r).clamp_(-12.0, 4.0)
        magnitude = (self.mu.abs() - push * r).clamp_min(0.0)
        self.mu.copy_(self.mu.sign() * magnitude)

    def zero(self, channels: Tensor) -> None:
        """``mu = 0``."""
        self.mu[channels] = 0.0
