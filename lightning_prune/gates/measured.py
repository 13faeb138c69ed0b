"""Methods that only measure while the network trains: Taylor (Molchanov 2019), OBD (LeCun 1990), APoZ (Hu 2016).

And the criteria that rank weights (:mod:`lightning_prune.criteria`), measured anew whenever they are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..channels.groups import ChannelGraph
from ..channels.trace import named_tensors
from ..criteria import saliency as criterion_saliency
from ..hooks import forget_compiled
from .attach import consumer_modules
from .base import Gates, learned

#: by default saliencies are taken and masks are chosen so many times in the learn phase
_ROUNDS = 20


class Measured(Gates):
    """A running mean of some statistic is the saliency; nothing is penalised, the masks follow the ramped budget.

    Args:
        model: see :class:`Gates`.
        graph: see :class:`Gates`.
        trainable: see :class:`Gates`.
        lr: see :class:`Gates`.
        snap_threshold: see :class:`Gates`.
        steps: see :class:`Gates`.
        interval: optimizer steps from one choice of masks to the next; by default a twentieth of the learn phase.
    """

    penalised: ClassVar[bool] = False
    decay = 0.9

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1, *, interval: int | None = None) -> None:  # fmt: skip
        if interval is not None and interval < 1:
            raise ValueError(f"interval must be a number of steps of at least 1; got {interval!r}")
        self.interval = interval if interval is not None else max(1, steps // _ROUNDS)
        self.mean = torch.zeros(trainable.shape, device=trainable.device)
        self.count = torch.zeros((), dtype=torch.int64)
        super().__init__(model, graph, trainable, lr, snap_threshold, steps)

    def attach(self) -> None:
        """Nothing to hang but the masks of resting channels."""
        if self.soft:
            self._hooks.attach(awake=self.awake)

    def final(self) -> Tensor:
        """Ones: what stays is as it was trained."""
        return torch.ones_like(self.trainable, dtype=torch.float32)

    def accumulate(self, value: Tensor) -> None:
        """Update the exponential mean (bias-corrected in :meth:`saliency`)."""
        self.mean.mul_(self.decay).add_(value.to(self.mean), alpha=1 - self.decay)
        self.count += 1

    def saliency(self) -> Tensor:
        """The mean, shape [num_channels]."""
        return self.mean / max(1 - self.decay ** int(self.count), 1e-12)

    def candidates(self) -> Tensor:
        """Nothing is snapped by its own value."""
        return torch.empty(0, dtype=torch.int64, device=self.mean.device)

    def tensors(self) -> dict[str, Tensor]:
        """The running mean."""
        return {"mean": self.mean, "count": self.count}


@learned("taylor")
class TaylorGates(Measured):
    """First-order Taylor importance ``(g dL/dg)^2`` of gates held at 1, after the norm (Molchanov et al. 2019, eq. 8).

    Of a resting channel, whose gate is 0, it is the squared slope of the loss towards letting it in again.
    """

    def attach(self) -> None:
        """Hang the gates on the consumers' weights: only there their gradient can be had."""
        self._hooks.attach()

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
class OBDGates(Measured):
    """Optimal brain damage for whole channels: ``sum_i 1/2 h_ii w_i^2`` over the filters and biases that make a channel.

    The diagonal Hessian is estimated by the diagonal Fisher, the running mean of squared gradients of the loss (LeCun et
    al. 1990 compute it by back-propagation of second derivatives; for a log-likelihood both agree at the optimum).
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1, **options: Any) -> None:  # fmt: skip
        self._tensors, self._device = named_tensors(model), trainable.device
        self._find_pieces(graph)
        super().__init__(model, graph, trainable, lr, snap_threshold, steps, **options)

    def _find_pieces(self, graph: ChannelGraph) -> None:
        """Per tensor that makes channels of a group: its dimension, positions along it, and whose they are."""
        self._pieces: list[tuple[Tensor, int, Tensor, Tensor]] = []
        for group in graph.groups:
            for member in group.by_role("out"):
                bias = member.tensor.removesuffix("weight") + "bias"
                owned = [(member.tensor, member.dim)]
                if bias != member.tensor and any(m.tensor == bias for m in group.members):
                    owned.append((bias, 0))
                for name, dim in owned:
                    channels = graph.positions(name, dim, [group])
                    positions = np.flatnonzero(channels >= 0)
                    where, whose = (
                        torch.from_numpy(i).to(self._device) for i in (positions, channels[positions])
                    )
                    self._pieces.append((self._tensors[name], dim, where, whose))

    def follow(self, graph: ChannelGraph) -> None:
        """The rows of the channels that are left."""
        super().follow(graph)
        self._find_pieces(graph)

    @torch.no_grad()
    def update(self, strength: Tensor) -> None:
        """Take in the gradients of the weights."""
        value = torch.zeros_like(self.mean)
        for weight, dim, positions, channels in self._pieces:
            if weight.grad is not None:
                product = 0.5 * (weight.grad * weight).float().square()
                rows = product.transpose(0, dim).reshape(product.shape[dim], -1).sum(dim=1)
                value.index_add_(0, channels, rows[positions])
        self.accumulate(value)


@learned("apoz")
class APoZGates(Measured):
    """Average percentage of zeros (Hu et al. 2016): channels that are mostly zero when they are read matter least."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1, **options: Any) -> None:  # fmt: skip
        self._model, self._modules = model, consumer_modules(model, graph)
        self._handles: list[RemovableHandle] = []
        self._live = torch.zeros(trainable.shape, device=trainable.device)
        self._reads = torch.zeros_like(self._live)
        super().__init__(model, graph, trainable, lr, snap_threshold, steps, **options)

    def attach(self) -> None:
        """Watch what consumers read."""
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(self._watch))
        forget_compiled()
        super().attach()  # after the watching: what rests is counted as it arrives

    def detach(self) -> None:
        """Stop watching."""
        super().detach()
        for handle in self._handles:
            handle.remove()
        if self._handles:
            forget_compiled()
        self._handles.clear()

    def saliency(self) -> Tensor:
        """Share of non-zeros relative to the mean of the group's live channels: layers differ too much for one threshold."""
        values = super().saliency()
        for group in self.graph.groups:
            held = values[group.ids][~self.dead[group.ids]]
            values[group.ids] = values[group.ids] / held.mean().clamp_min(1e-12) if len(held) else 0.0
        return values

    def follow(self, graph: ChannelGraph) -> None:
        """What is read of the channels that are left."""
        super().follow(graph)
        self._modules = consumer_modules(self._model, graph)

    @torch.compiler.disable  # it cannot be traced
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


class CriterionGates(Measured):
    """A criterion that ranks weights, evaluated on the weights of the moment; pruned gradually like the measured methods.

    Args:
        model: see :class:`Gates`.
        graph: see :class:`Gates`.
        trainable: see :class:`Gates`.
        lr: see :class:`Gates`.
        snap_threshold: see :class:`Gates`.
        steps: see :class:`Gates`.
        criterion: name in :data:`lightning_prune.criteria.CRITERIA`.
        seed: for ``"random"``.
        interval: see :class:`Measured`.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, trainable: Tensor, lr: float,
                 snap_threshold: float = 0.02, steps: int = 1, *, criterion: str, seed: int = 0,
                 interval: int | None = None) -> None:  # fmt: skip
        self._model, self._criterion, self._seed = model, criterion, seed
        super().__init__(model, graph, trainable, lr, snap_threshold, steps, interval=interval)

    def can_gate(self, model: nn.Module, graph: ChannelGraph) -> Tensor:
        """All channels: those that nothing can gate are ranked as well."""
        return torch.ones(graph.num_channels, dtype=torch.bool)

    def update(self, strength: Tensor) -> None:
        """Nothing to take in."""

    def saliency(self) -> Tensor:
        """The criterion's values, float64."""
        values = criterion_saliency(self._criterion, self._model, self.graph, self._seed)
        return torch.from_numpy(values).to(self.trainable.device)
