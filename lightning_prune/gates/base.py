"""The interface of every learned method, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..channels.groups import ChannelGraph
from .attach import GateHooks, consumer_channels

LEARNED: dict[str, type[Gates]] = {}


def learned(name: str) -> Callable[[type[Gates]], type[Gates]]:
    """Register a subclass of :class:`Gates` under ``name``, usable as ``method=name``."""

    def add(kind: type[Gates]) -> type[Gates]:
        kind.name = name
        LEARNED[name] = kind
        return kind

    return add


class Gates(ABC):
    """Learns one saliency per channel during the learn phase.

    A subclass has parameters of shape [num_channels] (possibly none), says what each channel is multiplied by, and how
    much of it is still there. The base class steps the parameters with Adam (:meth:`make_optimizer`) on the loss alone, then
    calls :meth:`shrink` for the penalty: separate steps keep the result independent of the loss's scale.

    Args:
        model: the network, for methods that read its weights; hooks are added only by :meth:`attach`.
        graph: its traced channels.
        trainable: bool, shape [num_channels], on the model's device: channels that may be pruned.
        lr: learning rate of the gates, constant.
        snap_threshold: magnitude at which a channel may be snapped.
        steps: optimizer steps in the learn phase.
    """

    name: ClassVar[str] = ""
    #: how far a parameter travels from its start to where its channel is gone; scales the default learning rate
    span: ClassVar[float] = 1.0
    #: whether a penalty drives channels to zero (otherwise the method only measures)
    penalised: ClassVar[bool] = True
    #: how strongly a channel's price weighs in its penalty; 1 is what minimising loss plus lambda times cost asks for
    price_exponent: ClassVar[float] = 0.5

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        trainable: Tensor,
        lr: float,
        snap_threshold: float = 0.02,
        steps: int = 1,
    ) -> None:
        self.graph = graph
        self.lr, self.snap_threshold, self.steps = lr, snap_threshold, steps
        self.trainable = trainable & self.can_gate(model, graph).to(trainable.device)
        self.dead = torch.zeros_like(trainable)
        #: masked for now: their multiplier is zero, their parameters and weights go on learning and may bring them back
        self.resting = torch.zeros_like(trainable)
        self._any_resting = False
        #: whether channels may rest at all; to be set before :meth:`attach`
        self.soft = False
        self._parameters = self.build()
        moving = list(self._parameters.values())
        self.optimizer = self.make_optimizer(moving) if moving else None
        self._hooks = GateHooks(model, graph, self.effective)

    # ---- what a method defines -------------------------------------------------------------------------------------

    def can_gate(self, model: nn.Module, graph: ChannelGraph) -> Tensor:
        """Channels this method can judge, bool of shape [num_channels]; by default those with consumers to gate."""
        return consumer_channels(graph)

    def build(self) -> dict[str, nn.Parameter]:
        """Create the parameters, each of shape [num_channels]."""
        return {}

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """What steps the parameters on the loss: Adam without weight decay."""
        return torch.optim.Adam(parameters, lr=self.lr, weight_decay=0.0)

    def multipliers(self, training: bool = True) -> Tensor:
        """What each channel is multiplied by in a forward call, shape [num_channels]."""
        return torch.ones_like(self.trainable, dtype=torch.float32)

    @abstractmethod
    def saliency(self) -> Tensor:
        """How much each channel matters, shape [num_channels], larger is more."""

    def presence(self) -> Tensor:
        """Share in [0, 1] of each channel that the controller still counts."""
        return (~self.dead).float()

    def shrink(self, strength: Tensor, moving: Tensor) -> None:
        """Apply the penalty ``sum_i strength_i * penalty_i`` to the ``moving`` channels."""

    def zero(self, channels: Tensor) -> None:
        """Put the parameters of snapped channels where the multiplier is zero."""

    def final(self) -> Tensor:
        """What is folded into the weights of the channels that stay, shape [num_channels]."""
        return self.multipliers(training=False).detach()

    def attach(self) -> None:
        """Hang the gates on the model."""
        self._hooks.attach()

    def follow(self, graph: ChannelGraph) -> None:
        """Dead channels have been cut out of the model's tensors (or put back): ``graph`` has the positions they have now.

        Whatever a method reads from the model's tensors by position it has to look up anew in here.
        """
        self._hooks.follow(graph)

    # ---- what they share -------------------------------------------------------------------------------------------

    def effective(self, training: bool = True) -> Tensor:
        """:meth:`multipliers` with zeros for resting channels, shape [num_channels]; gradients pass as if they were live."""
        return self.without_resting(self.multipliers(training))

    def without_resting(self, multipliers: Tensor) -> Tensor:
        """Zeros for resting channels (last dimension), with the gradient of the given multipliers."""
        return multipliers - (multipliers * self.resting).detach() if self._any_resting else multipliers

    def awake(self) -> Tensor | None:
        """1 for channels that take part, 0 for resting ones, shape [num_channels]; None when all take part."""
        return (~self.resting).float() if self._any_resting else None

    def rest(self, channels: Tensor) -> None:
        """Mask exactly ``channels`` (bool, shape [num_channels]) for now; every other one takes part again."""
        self.resting.copy_(channels)
        self._any_resting = bool(channels.any())

    def detach(self) -> None:
        """Take them off; the model is as it was."""
        self._hooks.detach()

    def parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients are averaged over ranks."""
        return list(self._parameters.values())

    def synchronise(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average gradients over ranks with ``reduce``; a rank without one counts as zero."""
        for parameter in self.parameters():
            grad = parameter.grad
            parameter.grad = reduce(torch.zeros_like(parameter) if grad is None else grad)

    @torch.no_grad()
    def update(self, strength: Tensor) -> None:
        """One step on the accumulated gradients, then the penalty. Dead and untrainable channels do not move."""
        moving = self.trainable & ~self.dead
        before = [p.detach().clone() for p in self.parameters()]
        if self.optimizer is not None and all(p.grad is not None for p in self.parameters()):
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(moving)
            self.optimizer.step()
        for parameter in self.parameters():
            parameter.grad = None
        self.shrink(strength, moving)
        for parameter, old in zip(self.parameters(), before, strict=True):
            parameter.copy_(torch.where(moving, parameter, old))

    @torch.no_grad()
    def snap(self, channels: Tensor) -> None:
        """Set the gates of ``channels`` (int64 ids) to zero and freeze them."""
        self.dead[channels] = True
        self.zero(channels)

    def candidates(self) -> Tensor:
        """Ids of live trainable channels at or below the threshold, smallest first."""
        values = self.saliency()
        small = self.trainable & ~self.dead & (values <= self.snap_threshold)
        ids = small.nonzero().squeeze(1)
        return ids[torch.argsort(values[ids], stable=True)]

    def tensors(self) -> dict[str, Tensor]:
        """Further tensors that a checkpoint must hold."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, statistics, dead flags and optimizer state."""
        tensors = {**self._parameters, **self.tensors(), "dead": self.dead, "resting": self.resting}
        return {
            "tensors": {name: t.detach().cpu().clone() for name, t in tensors.items()},
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        tensors = {**self._parameters, **self.tensors(), "dead": self.dead}
        for name, tensor in tensors.items():
            tensor.copy_(state["tensors"][name])
        self.rest(state["tensors"].get("resting", torch.zeros_like(self.dead)))
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
