"""Methods that only measure while the network trains: Taylor (Molchanov 2019), OBD (LeCun 1990), APoZ (Hu 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..channels.groups import ChannelGraph
from ..channels.trace import named_tensors
from .attach import consumer_modules
from .base import Gates, learned


class _Measured(Gates):
    """A running mean of some statistic is the saliency; nothing is penalised, the final selection does all."""

    penalised: ClassVar[bool] = False
    decay = 0.9

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1) -> None:  # fmt: skip
        self.mean = torch.zeros(trainable.shape, device=trainable.device)
        self.count = torch.zeros((), dtype=torch.int64)
        super().__init__(model, graph, trainable, lr, snap_threshold, steps)

    def accumulate(self, value: Tensor) -> None:
        """Update the exponential mean (bias-corrected in :meth:`saliency`)."""
        self.mean.mul_(self.decay).add_(value.to(self.mean), alpha=1 - self.decay)
        self.count += 1

    def saliency(self) -> Tensor:
        """The mean, shape [num_channels]."""
        return self.mean / max(1 - self.decay ** int(self.count), 1e-12)

    def candidates(self) -> Tensor:
        """Nothing is snapped while measuring."""
        return torch.empty(0, dtype=torch.int64, device=self.mean.device)

    def tensors(self) -> dict[str, Tensor]:
        """The running mean."""
        return {"mean": self.mean, "count": self.count}


@learned("taylor")
class TaylorGates(_Measured):
    """First-order Taylor importance ``(g dL/dg)^2`` of gates held at 1, after the norm (Molchanov et al. 2019, eq. 8)."""

    def build(self) -> dict[str, nn.Parameter]:
        """Gates that never move; only their gradient counts."""
        self.values = nn.Parameter(torch.ones(self.trainable.shape, device=self.trainable.device))
        return {"values": self.values}

    def multipliers(self, training: bool = True) -> Tensor:
        """Ones with a gradient."""
        return self.values

    @torch.no_grad()
    def update(self, strength: Tensor) -> None:
        """Take in the gradient."""
        if self.values.grad is not None:
            self.accumulate(self.values.grad.square())
            self.values.grad = None


@learned("obd")
class OBDGates(_Measured):
    """Optimal brain damage for whole channels: ``sum_i 1/2 h_ii w_i^2`` over the filters and biases that make a channel.

    The diagonal Hessian is estimated by the diagonal Fisher, the running mean of squared gradients of the loss (LeCun et
    al. 1990 compute it by back-propagation of second derivatives; for a log-likelihood both agree at the optimum).
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1) -> None:  # fmt: skip
        tensors = named_tensors(model)
        self._pieces = []
        for group in graph.groups:
            for member in group.by_role("out"):
                bias = member.tensor.removesuffix("weight") + "bias"
                index = torch.from_numpy(member.index).to(trainable.device)
                self._pieces.append((tensors[member.tensor], member.dim, group.ids, index))
                if bias != member.tensor and any(m.tensor == bias for m in group.members):
                    self._pieces.append((tensors[bias], 0, group.ids, index))
        super().__init__(model, graph, trainable, lr, snap_threshold, steps)

    def attach(self) -> None:
        """Nothing to hang: the weights' own gradients are read."""

    @torch.no_grad()
    def update(self, strength: Tensor) -> None:
        """Take in the gradients of the weights."""
        value = torch.zeros_like(self.mean)
        for weight, dim, ids, index in self._pieces:
            if weight.grad is not None:
                product = 0.5 * (weight.grad * weight).float().square()
                rows = product.transpose(0, dim).reshape(product.shape[dim], -1).sum(dim=1)
                value[ids] += rows[index].sum(dim=1)
        self.accumulate(value)


@learned("apoz")
class APoZGates(_Measured):
    """Average percentage of zeros (Hu et al. 2016): channels that are mostly zero when they are read matter least."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1) -> None:  # fmt: skip
        self._modules = consumer_modules(model, graph)
        self._handles: list[RemovableHandle] = []
        self._live = torch.zeros(trainable.shape, device=trainable.device)
        self._reads = torch.zeros_like(self._live)
        super().__init__(model, graph, trainable, lr, snap_threshold, steps)

    def attach(self) -> None:
        """Watch what consumers read."""
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._watch))

    def detach(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def saliency(self) -> Tensor:
        """Share of non-zeros relative to the mean of the group: layers differ too much for one threshold."""
        values = super().saliency()
        for group in self.graph.groups:
            values[group.ids] = values[group.ids] / values[group.ids].mean().clamp_min(1e-12)
        return values

    @torch.no_grad()
    def _watch(self, module: nn.Module, args: Any) -> None:
        if module.training and args and isinstance(args[0], Tensor):
            dim, index = self._modules[module]
            share = (
                (args[0] != 0).float().mean(dim=[d for d in range(args[0].dim()) if d != dim % args[0].dim()])
            )
            gated = index >= 0
            self._live.index_add_(0, index[gated], share[gated])
            self._reads.index_add_(0, index[gated], torch.ones_like(share[gated]))

    def synchronise(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average what the ranks saw."""
        self._live, self._reads = reduce(self._live), reduce(self._reads)

    @torch.no_grad()
    def update(self, strength: Tensor) -> None:
        """Take in the shares of this step."""
        self.accumulate(self._live / self._reads.clamp_min(1))
        self._live.zero_()
        self._reads.zero_()
