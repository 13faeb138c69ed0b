"""Maps of live channels only between the modules of a training network whose parameters keep their full size.

A dead channel costs as much memory traffic as a live one: norms, activations, poolings and sums pass over it. But the
network runs on any number of channels that its own consumers agree on; that is what compaction rests on. So while the whole
network is called, convolutions put out live channels alone, everything behind them works on fewer channels, and dense layers
get their dead inputs back as zeros. What comes out of the network has no channels of its own and is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .channels.groups import ChannelGraph, Mask
from .gates.attach import LIVE_INPUTS, GateHooks, consumer_channels
from .hooks import SLOT, ExchangedCall, Marker, PrivateHook, compiled, is_private, only_plain_calls

#: live share of the channels from which on full maps, whose rows are aligned, are as fast
MOST_LIVE = 0.9
#: channels of which the vendor's CUDA kernels want a multiple, at 2 bytes each
_CUDA_LANES = 8


def live_indices(alive: np.ndarray, device: torch.device | str = "cpu") -> Tensor | None:
    """Positions, int64, where ``alive`` (bool, one dimension) is True; None for all of them."""
    # Nobody waits: what is in pageable memory has been read when the copy returns.
    return None if alive.all() else torch.from_numpy(np.flatnonzero(alive)).to(device, non_blocking=True)


class LiveMaps:
    """Whether maps hold live channels only at this moment, and the hooks and calls that decide it.

    Only inside a call of the whole network, in training; never under autocast on the CPU, in ``torch.compile``, under a
    dispatch mode, with ``torch.use_deterministic_algorithms``, or while a module inside the network has hooks of the user's,
    who would see fewer channels. Networks that need more than narrower parameters of convolutions, 2-D batch norms and dense
    layers (sizes spelled out, norms over channels) keep full maps: :attr:`obstacle` says why.

    Args:
        model: the network.
        graph: its traced channels.
        known: modules that take compact maps and put them out as :meth:`wanted` says.
        calls: modules that compute the whole network, see ``whole_network_calls``.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, known: Sequence[nn.Module], calls: Sequence[nn.Module]
    ) -> None:
        self._graph = graph
        self._linear: dict[nn.Linear, _Linear] = {}
        self._calls: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._private: dict[nn.Module, tuple[int, ...]] = {}  # keys of hooks that nobody else listens by
        self._possible = False
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        self.running = False
        self.narrow = False  #: whether the last call of the whole network had compact maps
        self.always = False  #: in evaluation too
        whole = set(calls)
        self._inside = [m for m in model.modules() if m not in whole and not _holds(m, whole)]
        self.obstacle = _obstacle(model, graph, known)
        if self.obstacle is None and not calls:
            self.obstacle = "no module is known to compute the whole network"
        if self.obstacle is None and any(compiled(module) for module in self._inside):
            self.obstacle = "a part of the network is compiled, for maps of all channels"
        if self.obstacle is not None:
            return
        for module in model.modules():
            if type(module) is nn.Linear:
                self._hang(model, module)
        for call in calls:
            inner = call.__dict__.get(SLOT)
            if inner is None or isinstance(inner, ExchangedCall):  # else it is somebody else's: torch.compile
                object.__setattr__(call, SLOT, _WholeCall(self, call, inner))
                self._calls.append(call)

    def _hang(self, model: nn.Module, module: nn.Linear) -> None:
        name = next(n for n, p in model.named_parameters() if p is module.weight)
        if name not in self._graph.tensors:
            return
        positions = self._graph.positions(name, 0), self._graph.positions(name, 1)
        if all((p < 0).all() for p in positions):
            return
        self._linear[module] = layer = _Linear(self, *positions, module.weight.device)
        self._handles += [
            module.register_forward_pre_hook(_Widen(layer)),
            module.register_forward_hook(_Narrow(layer)),
        ]

    def set_mask(self, mask: Mask, share: float) -> None:
        """Take up which channels live, bool of shape [num_channels]; ``share``: how many of the maps' present ones do."""
        some_everywhere = all(mask[group.ids].any() for group in self._graph.groups)
        self._possible = self.obstacle is None and some_everywhere and share < MOST_LIVE
        for module, layer in self._linear.items():
            layer.set_mask(mask)
            module.__dict__[LIVE_INPUTS] = Marker(layer.live_in)

    def wanted(self) -> bool:
        """Whether a module whose input is not compact yet puts out a compact map."""
        if self.running:
            return True
        # A checkpointed part of the network is computed again in the backward pass, and must come out alike.
        return self.narrow and torch._C._current_graph_task_id() != -1

    def ready(self, call: nn.Module, args: Any) -> bool:
        """Whether this call of the whole network may run with compact maps."""
        if not self._possible or self.running or not (call.training or self.always):
            return False
        if only_plain_calls(self._device, cast=self._device == "cpu"):
            return False
        if any(isinstance(a, Tensor) and a.device.type != self._device for a in args):
            return False
        return not any(self._listened(module) for module in self._inside)

    def _listened(self, module: nn.Module) -> bool:
        """:func:`_hooked`, remembered for the same hooks: no two have the same key."""
        own = module.__dict__
        if "forward" in own or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        after, before = own["_forward_hooks"], own["_forward_pre_hooks"]
        if not after and not before:
            return False
        keys = (*after, 0, *before)
        if self._private.get(module) == keys:
            return False
        if _hooked(module):
            return True
        self._private[module] = keys
        return False

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``call`` with compact maps."""
        self.running = self.narrow = True
        try:
            return call(*args, **kwargs)
        finally:
            self.running = False

    def full(self) -> None:
        """What is computed again in a backward pass had full maps: parts of a call of the whole network, or of no such call."""
        self.narrow = False

    def detach(self) -> None:
        """Remove hooks and exchanged calls."""
        for handle in self._handles:
            handle.remove()
        for call in self._calls:
            slot = call.__dict__.get(SLOT)
            if isinstance(slot, _WholeCall):
                object.__setattr__(call, SLOT, slot.inner) if slot.inner is not None else call.__dict__.pop(
                    SLOT
                )
        for module in self._linear:
            module.__dict__.pop(LIVE_INPUTS, None)
        self._handles.clear()
        self._calls.clear()
        self._possible = False


class _WholeCall(ExchangedCall):
    """What is called in place of a module that computes the whole network."""

    def __init__(self, maps: LiveMaps, module: nn.Module, inner: Any) -> None:
        super().__init__(module)
        self.maps, self.inner = maps, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.module._call_impl if self.inner is None else self.inner
        if torch.compiler.is_compiling() or self.maps.running:
            return call(*args, **kwargs)
        if self.maps.ready(self.module, args):
            return self.maps.run(call, *args, **kwargs)
        if torch.is_grad_enabled():  # else nothing of it is computed again
            self.maps.full()
        return call(*args, **kwargs)


class _Linear:
    """A dense layer and its live features, None for all."""

    def __init__(self, maps: LiveMaps, outs: np.ndarray, ins: np.ndarray, device: torch.device) -> None:
        self.maps, self._outs, self._ins, self._device = maps, outs, ins, device
        self.live_in: Tensor | None = None
        self.live_out: Tensor | None = None
        self.narrow = False

    def set_mask(self, mask: Mask) -> None:
        live = np.append(mask, True)
        ins, outs = live[self._ins], live[self._outs]
        self.live_in, self.live_out = live_indices(ins, self._device), live_indices(outs, self._device)


class _Widen(PrivateHook):
    """Before a dense layer: zeros for its dead inputs."""

    def __init__(self, layer: _Linear) -> None:
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        layer, live = self._layer, self._layer.live_in
        layer.narrow = not torch.compiler.is_compiling() and layer.maps.wanted()
        if live is None or torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
            return None
        x, *rest = args
        if x.shape[-1] != len(live):
            return None
        layer.narrow = True
        wide = x.new_zeros(*x.shape[:-1], module.in_features)
        return (wide.index_copy(-1, live, x), *rest)


class _Narrow(PrivateHook):
    """Behind a dense layer: its live outputs."""

    def __init__(self, layer: _Linear) -> None:
        self._layer = layer

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        live = self._layer.live_out
        if live is None or not self._layer.narrow or torch.compiler.is_compiling():
            return None
        return output.index_select(-1, live)


def aligned_groups(mask: Mask, graph: ChannelGraph, layers: Iterable[Any]) -> Mask:
    """``mask`` with as many dead channels of each group that the layers have as make the number of living ones a multiple of 8.

    Their weights are zero, so that they put out zeros wherever the group is computed.
    """
    present = np.zeros(len(mask) + 1, dtype=bool)
    for layer in layers:
        present[layer.out_channels] = present[layer.in_channels] = True
    wanted = mask.copy()
    for group in graph.groups:
        dead = np.flatnonzero(~mask[group.ids] & present[:-1][group.ids]) + group.start
        alive = int(mask[group.ids].sum())
        wanted[dead[: -alive % _CUDA_LANES]] = True
    return wanted


def norm_channels(
    model: nn.Module, graph: ChannelGraph, norms: list[nn.BatchNorm2d]
) -> dict[nn.BatchNorm2d, np.ndarray]:
    """Channel of each position of every norm that has any, -1 for none."""
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    found = {}
    for norm in norms:
        tensors = (*norm._parameters.values(), *norm._buffers.values())
        own = (names.get(id(t)) for t in tensors if t is not None and t.dim() == 1)
        name = next((n for n in own if n in graph.tensors), None)
        if name is not None:
            found[norm] = graph.positions(name, 0)
    return found


def _holds(module: nn.Module, others: set[nn.Module]) -> bool:
    return any(m in others for m in module.modules())


def _hooked(module: nn.Module) -> bool:
    """Whether somebody else listens to a module or has changed its call."""
    own = module.__dict__
    if "forward" in own or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
        for hook in hooks.values():
            if not is_private(hook) and not isinstance(getattr(hook, "__self__", None), GateHooks):
                return True
    return False


def _obstacle(model: nn.Module, graph: ChannelGraph, known: Sequence[nn.Module]) -> str | None:
    """Why narrower parameters of the usual layers are not all that fewer channels need; None if they are."""
    if graph.sizes:
        return f"{graph.sizes[0].module or 'the network'} spells out sizes in {graph.sizes[0].function}"
    if not bool(consumer_channels(graph).all()):
        return "a weight is read outside the module that owns it, or a norm goes over channels"
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(module)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in graph.groups:
        for member in group.members:
            for owner in owners.get(id(tensors.get(member.tensor)), [model]):
                if type(owner) is not nn.Linear and owner not in known:
                    return f"{member.tensor} belongs to a {type(owner).__name__}"
    return None
