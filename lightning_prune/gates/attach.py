"""Hang gates on a model without changing it.

A gate on a channel multiplies what every consumer reads from it. Multiplying the consumer's weight columns is the same
function (the consumer is linear in its input) at a fraction of the memory traffic, exact for every activation in between
(f(0) need not be 0), and folds into the weights without approximation. During a module's forward call the gated weight
shadows the parameter as an instance attribute; ``parameters()`` and ``state_dict()`` never change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from ..channels.groups import ChannelGraph
from ..hooks import forget_compiled

#: A module with this attribute multiplies its own weight's columns by IN_GATE, shape [inputs], during its forward call.
TAKES_GATES, IN_GATE = "_takes_gates", "_in_gate"
#: the value of this mark on a module is an int64 tensor: the inputs that a narrower map has
LIVE_INPUTS = "_live_inputs"


@dataclass(frozen=True)
class Site:
    """One contracted dimension of one consumer weight: ``index`` maps its positions to channels, -1 to none."""

    tensor: str
    dim: int
    index: Tensor
    _index: Tensor = field(init=False, repr=False)  # where the multipliers are
    _first: int = field(init=False, repr=False)  # of a run of channels, -1 for anything else
    _all: bool = field(init=False, repr=False)  # whether every position belongs to a channel

    def __post_init__(self) -> None:
        first = int(self.index[0]) if len(self.index) else -1
        run = first >= 0 and torch.equal(self.index.cpu(), torch.arange(first, first + len(self.index)))
        object.__setattr__(self, "_index", self.index)
        object.__setattr__(self, "_first", first if run else -1)
        object.__setattr__(self, "_all", bool((self.index >= 0).all()))

    @property
    def run(self) -> tuple[int, int] | None:
        """First channel and number of channels where the positions are a run of channels, else None."""
        return (self._first, len(self.index)) if self._first >= 0 else None

    def scale(self, multipliers: Tensor, ndim: int) -> Tensor:
        """Multipliers laid out along ``dim``, ones where no channel is gated. Broadcasts against the weight."""
        shape = [1] * ndim
        shape[self.dim] = -1
        if self._first >= 0:
            return multipliers.narrow(0, self._first, len(self.index)).view(shape)
        if self._index.device != multipliers.device:
            object.__setattr__(self, "_index", self._index.to(multipliers.device))
        if self._all:
            return multipliers.index_select(0, self._index).view(shape)
        padded = torch.cat([multipliers, multipliers.new_ones(1)])
        return padded.index_select(0, self._index.where(self._index >= 0, len(multipliers))).view(shape)


def consumer_sites(graph: ChannelGraph) -> list[Site]:
    """Where gates act: the consumer columns of every gateable group, as far as they are left."""
    index: dict[tuple[str, int], np.ndarray] = {}
    for group in graph.groups:
        if not group.gateable:
            continue
        for member in group.by_role("in"):
            key = (member.tensor, member.dim)
            columns = index.setdefault(key, np.full(graph.tensors[member.tensor][member.dim], -1, np.int64))
            columns[member.index] = np.arange(group.start, group.start + group.size)[:, None]
    return [
        Site(tensor, dim, torch.from_numpy(columns[graph.left(tensor, dim)]))
        for (tensor, dim), columns in index.items()
    ]


def consumer_channels(graph: ChannelGraph) -> Tensor:
    """Channels that can be gated, bool of shape [num_channels]."""
    found = torch.zeros(graph.num_channels, dtype=torch.bool)
    for group in graph.groups:
        found[group.ids] = group.gateable
    return found


def consumer_modules(model: nn.Module, graph: ChannelGraph) -> dict[nn.Module, tuple[int, Tensor]]:
    """Convolutions and linear layers that read gateable channels: input dimension, and channel of each position (or -1)."""
    parameters = dict(model.named_parameters())
    sites = {id(parameters[site.tensor]): site for site in consumer_sites(graph)}
    found: dict[nn.Module, tuple[int, Tensor]] = {}
    for module in model.modules():
        site = sites.get(id(module._parameters.get("weight")))
        if site is None:
            continue
        if isinstance(module, nn.Linear):
            found[module] = (-1, site.index.to(module.weight.device))
        elif isinstance(module, _ConvNd):
            spatial = len(module.kernel_size)
            groups = 1 if module.transposed else module.groups
            found[module] = (-1 - spatial, site.index.repeat(groups).to(module.weight.device))
    return found


class _StraightThrough(torch.autograd.Function):
    """``x * mask`` whose gradient is that of ``x``: who feeds a masked channel goes on learning.

    That is how soft pruning trains the filters it has zeroed (He et al. 2018, "Soft Filter Pruning"), and the gradient of
    dynamic pruning with feedback (Lin et al. 2020, eq. 1): taken at the masked network, applied to all weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        """Masked; shapes broadcast."""
        return x * mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        """As if there were no mask."""
        return grads[0], None


class _Runs:
    """Runs of channels of one tensor, cut out of it at once: in the backward pass their gradients become one again in one step.

    Args:
        runs: first channel and number of channels.
        size: of the tensor.
    """

    def __init__(self, runs: set[tuple[int, int]], size: int) -> None:
        self._place: dict[tuple[int, int], int] = {}
        self._sizes: list[int] = []
        self._of: tuple[Any, ...] = ()
        self._pieces: tuple[Tensor, ...] = ()
        end = 0
        for first, count in sorted(runs):
            if first < end:  # runs that share channels are cut out one by one
                continue
            if first > end:
                self._sizes.append(first - end)
            self._place[first, count] = len(self._sizes)
            self._sizes.append(count)
            end = first + count
        if end < size:
            self._sizes.append(size - end)

    def piece(self, whole: Tensor, run: tuple[int, int] | None) -> Tensor | None:
        """The run of ``whole``, shape [count]; None if it has to be cut out by itself."""
        place = None if run is None else self._place.get(run)
        # What is computed anew for each module is not worth it; inference tensors have no version.
        if place is None or not whole.is_leaf or whole.dim() != 1 or whole.is_inference():
            return None
        of = (whole, whole._version, torch.is_grad_enabled())
        if not self._of or self._of[0] is not whole or self._of[1:] != of[1:]:
            self._of, self._pieces = of, whole.split(self._sizes)
        return self._pieces[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of": (), "_pieces": ()}

    def forget(self) -> None:
        """Hold nothing of a tensor any more."""
        self._of = self._pieces = ()


class GateHooks:
    """Applies ``multipliers(training)`` (a tensor of shape [num_channels]) to every consumer while attached."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, multipliers: Callable[[bool], Tensor]) -> None:
        self._model, self._multipliers = model, multipliers
        self._samples: Callable[[int], Tensor] | None = None
        self._awake: Callable[[], Tensor | None] | None = None
        self._handles: list[RemovableHandle] = []
        self.follow(graph)

    def follow(self, graph: ChannelGraph) -> None:
        """Take up which channel every column belongs to now, also while attached."""
        model = self._model
        self._inputs = consumer_modules(model, graph)
        self._sites: dict[nn.Module, list[tuple[str, Site]]] = defaultdict(list)
        parameters = dict(model.named_parameters())
        for site in consumer_sites(graph):
            for module in model.modules():  # a tied weight is gated wherever it is registered
                for attribute, parameter in module._parameters.items():
                    if parameter is not None and parameter is parameters.get(site.tensor):
                        self._sites[module].append((attribute, site))
        sites = (site for found in self._sites.values() for _, site in found)
        self._runs = _Runs({site.run for site in sites if site.run is not None}, graph.num_channels)

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def attach(
        self,
        per_sample: Callable[[int], Tensor] | None = None,
        awake: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Register the hooks (once).

        With ``per_sample`` (batch size -> [batch, num_channels]) convolutions and linear layers in training mode have
        their inputs multiplied, sample by sample, instead of their weights. With ``awake`` (-> 0 or 1 per channel, None:
        all 1) nothing else is multiplied, and in training mode the inputs are, with a straight-through gradient.
        """
        self._samples, self._awake = per_sample, awake
        if not self.attached:
            for module in self._sites:
                self._handles.append(module.register_forward_pre_hook(self._shadow))
                # always_call: a forward that raises must not leave its gated weight behind
                self._handles.append(module.register_forward_hook(self._restore, always_call=True))
            forget_compiled()

    def detach(self) -> None:
        """Remove the hooks; the model is exactly as it was."""
        for handle in self._handles:
            handle.remove()
        if self.attached:
            forget_compiled()
        self._handles.clear()
        self._runs.forget()
        for module in self._sites:
            self._restore(module)

    def gate(self, module: nn.Module) -> tuple[bool, Tensor | None]:
        """Whether a module in training that multiplies its own columns is gated like that and in no other way, and its gate.

        Returns:
            The gate has shape [inputs], None for no gate: what :data:`IN_GATE` would be during the module's call.
        """
        sites = self._sites[module]
        if self._awake is not None or self._samples is not None or len(sites) != 1:
            return False, None
        attribute, site = sites[0]
        if attribute != "weight" or module.__dict__.get(TAKES_GATES) is None:
            return False, None
        multipliers = self._multipliers(module.training)
        gate = self._runs.piece(multipliers, site.run)
        if gate is None:
            gate = site.scale(multipliers, 1 + site.dim).flatten()
        dtype = module._parameters[attribute].dtype  # type: ignore[union-attr]
        return True, gate if gate.dtype == dtype else gate.to(dtype)

    def _shadow(self, module: nn.Module, args: Any) -> Any:
        awake = self._awake() if self._awake is not None else None
        if self._awake is not None and awake is None:
            return None
        if module.training and module in self._inputs and (self._samples is not None or awake is not None):
            x, *rest = args
            if self._samples is not None:
                factors = self._laid_out(module, x, self._samples(x.shape[0]))
                return (x * factors, *rest)
            assert awake is not None
            return (_StraightThrough.apply(x, self._laid_out(module, x, awake[None])), *rest)
        multipliers = self._multipliers(module.training)
        for attribute, site in self._sites[module]:
            weight = module.__dict__.get(attribute, module._parameters[attribute])
            assert weight is not None
            if (
                attribute == "weight"
                and module.__dict__.get(TAKES_GATES) is not None
                and not torch.compiler.is_compiling()
            ):
                gate = self._runs.piece(multipliers, site.run)
                if gate is None:
                    gate = site.scale(multipliers, weight.dim()).flatten()
                module.__dict__[IN_GATE] = gate.to(weight.dtype)
            else:
                scale = site.scale(multipliers, weight.dim()).to(weight.dtype)
                module.__dict__[attribute] = weight * scale
        return None

    def _laid_out(self, module: nn.Module, x: Tensor, factors: Tensor) -> Tensor:
        """``factors`` of shape [batch or 1, num_channels] so that they broadcast against the module's input ``x``."""
        dim, index = self._inputs[module]
        if x.shape[dim] != len(index):
            index = index[module.__dict__[LIVE_INPUTS].value]
        padded = torch.cat([factors, factors.new_ones(len(factors), 1)], dim=1)[:, index]
        shape = [1] * x.dim()
        shape[0], shape[dim] = len(factors), -1
        return padded.view(shape).to(x.dtype)

    def _restore(self, module: nn.Module, *unused: Any) -> None:
        for attribute, _ in self._sites[module]:
            module.__dict__.pop(attribute, None)
        module.__dict__.pop(IN_GATE, None)
