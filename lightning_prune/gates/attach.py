"""Hang gates on a model without changing it.

A gate on a channel multiplies what every consumer reads from it. Multiplying the consumer's weight columns is the same
function (the consumer is linear in its input) at a fraction of the memory traffic, exact for every activation in between
(f(0) need not be 0), and folds into the weights without approximation. During a module's forward call the gated weight
shadows the parameter as an instance attribute; ``parameters()`` and ``state_dict()`` never change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..channels.groups import ChannelGraph


@dataclass(frozen=True)
class Site:
    """One contracted dimension of one consumer weight: ``index`` maps its positions to channels, -1 to none."""

    tensor: str
    dim: int
    index: Tensor

    def scale(self, multipliers: Tensor, ndim: int) -> Tensor:
        """Multipliers laid out along ``dim``, ones where no channel is gated. Broadcasts against the weight."""
        if self.index.device != multipliers.device:
            object.__setattr__(self, "index", self.index.to(multipliers.device))
        padded = torch.cat([multipliers, multipliers.new_ones(1)])
        shape = [1] * ndim
        shape[self.dim] = -1
        return padded[self.index].view(shape)


def consumer_sites(graph: ChannelGraph) -> list[Site]:
    """Where gates act: the consumer columns of every gateable group."""
    index: dict[tuple[str, int], np.ndarray] = {}
    for group in graph.groups:
        if not group.gateable:
            continue
        for member in group.by_role("in"):
            key = (member.tensor, member.dim)
            columns = index.setdefault(key, np.full(graph.tensors[member.tensor][member.dim], -1, np.int64))
            columns[member.index] = np.arange(group.start, group.start + group.size)[:, None]
    return [Site(tensor, dim, torch.from_numpy(columns)) for (tensor, dim), columns in index.items()]


class GateHooks:
    """Applies ``multipliers()`` (a tensor of shape [num_channels]) to every consumer weight while attached."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, multipliers: Callable[[], Tensor]) -> None:
        self._multipliers = multipliers
        self._sites: dict[nn.Module, list[tuple[str, Site]]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        parameters = dict(model.named_parameters())
        for site in consumer_sites(graph):
            for module in model.modules():  # a tied weight is gated wherever it is registered
                for attribute, parameter in module._parameters.items():
                    if parameter is not None and parameter is parameters.get(site.tensor):
                        self._sites[module].append((attribute, site))

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register the hooks (once)."""
        if not self.attached:
            for module in self._sites:
                self._handles.append(module.register_forward_pre_hook(self._shadow))
                # always_call: a forward that raises must not leave its gated weight behind
                self._handles.append(module.register_forward_hook(self._restore, always_call=True))

    def detach(self) -> None:
        """Remove the hooks; the model is exactly as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._sites:
            self._restore(module)

    def _shadow(self, module: nn.Module, args: Any) -> None:
        multipliers = self._multipliers()
        for attribute, site in self._sites[module]:
            weight = module.__dict__.get(attribute, module._parameters[attribute])
            assert weight is not None
            module.__dict__[attribute] = weight * site.scale(multipliers, weight.dim()).to(weight.dtype)

    def _restore(self, module: nn.Module, *unused: Any) -> None:
        for attribute, _ in self._sites[module]:
            module.__dict__.pop(attribute, None)
