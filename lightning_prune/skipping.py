"""Convolutions by faster kernels while a network trains: Winograd where it fits, and without dead channels.

A dead channel's weights are zero, so leaving it out gives the same numbers. The parameters keep their full size: only the
call of the convolution changes, during the module's own forward, on top of whatever shadows its weight there (gates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import conv_ways
from .channels.groups import ChannelGraph, Mask
from .compaction import CompactionPlan, mask_channels, max_relative_error
from .compaction.apply import clone_model
from .conv_norms import PAIRED, Pair
from .conv_ways import ALL_PLAIN, FULL, PLAIN, SKIP, Choice, ConvCall, SkippedConv
from .fused_norms import FusedNorms
from .gates.attach import IN_GATE, LIVE_INPUTS, TAKES_GATES, GateHooks
from .hooks import Marker, PrivateHook, only_plain_calls
from .inputs import ExampleInputs, floating_dtype, to_model
from .live_maps import LiveMaps, aligned_groups, live_indices, norm_channels
from .nn._convert import symmetric_padding
from .ops.availability import can_run_masked_conv2d, cuda_built, extension_available
from .ops.map_memory import release_maps
from .reused_memory import ReusedMemory
from .whole_network import whole_network_calls

#: smaller convolutions (multiply-accumulates of one dense forward call) are left alone
LEAST_MACS = 400_000
#: largest difference of a network with narrower maps, relative to its largest output, that rounding explains
_AGREEMENT = 1e-3


@dataclass
class _Layer:
    """A convolution and what is dead of it at present.

    Attributes:
        module: the convolution.
        out_channels: channel of each output, -1 for none; likewise ``in_channels``.
        padding: two integers.
        steps: in which ``share`` is told apart.
        live_in: int64 inputs that live, None for all; likewise ``live_out``.
        share: of the multiply-accumulates that live.
        wanted: whether maps that come out of it hold live channels only.
        memory: for the gradient of its weight.
        hooks, heard, pairs, new_pairs: see :class:`lightning_prune.conv_norms.Convolution`.
        verdicts: kind of call -> step of ``share`` at which it was measured, and what came out.
    """

    module: nn.Conv2d
    out_channels: np.ndarray
    in_channels: np.ndarray
    padding: tuple[int, int]
    steps: int = 10
    live_in: Tensor | None = None
    live_out: Tensor | None = None
    share: float = 1.0
    wanted: Callable[[], bool] = lambda: False
    memory: ReusedMemory = field(default_factory=ReusedMemory)
    hooks: tuple[Any, ...] = ()
    heard: tuple[tuple[int, ...], bool, GateHooks | None] | None = None
    pairs: dict[tuple[Any, ...], Pair | None] = field(default_factory=dict)
    new_pairs: dict[tuple[Any, ...], Pair | None] = field(default_factory=dict)
    verdicts: dict[tuple[Any, ...], tuple[int, Choice]] = field(default_factory=dict)

    def set_mask(self, mask: Mask) -> None:
        """Take up which channels live, bool of shape [num_channels]."""
        live = np.append(mask, True)  # position -1: belongs to no channel
        ins, outs = live[self.in_channels], live[self.out_channels]
        depthwise = self.module.groups > 1 and self.module.groups == self.module.in_channels
        if depthwise:  # its weight has no columns: an input lives with its outputs
            ins = outs.reshape(self.module.groups, -1).any(axis=1)
        device = self.module.weight.device
        self.live_in, self.live_out = live_indices(ins, device), live_indices(outs, device)
        self.share = float(outs.mean() * (1.0 if depthwise else ins.mean()))
        self.pairs.clear()
        self.new_pairs.clear()

    def next_step(self) -> None:
        """See :meth:`DeadChannelSkipper.next_step`."""
        self.pairs |= self.new_pairs
        self.new_pairs.clear()

    def call(self, compact: bool = False) -> ConvCall:
        """The convolution of maps that hold all channels, or the live ones alone."""
        conv = self.module
        settings = list(conv.stride), list(self.padding), list(conv.dilation), conv.groups
        return ConvCall(*settings, self.live_in, self.live_out, compact, self.memory)

    def compact(self, x: Any) -> bool:
        """Whether ``x`` holds live channels only, or what comes out of it is to."""
        if not isinstance(x, Tensor) or x.dim() != 4:
            return False
        if self.live_in is not None and x.shape[1] == len(self.live_in):
            return True
        return (self.live_in is not None or self.live_out is not None) and self.wanted()

    def one_way(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
    ) -> tuple[ConvCall, int] | None:
        """The call and the one compiled way that all of its parts take; None if they do not, or it is not known yet."""
        compact = self.compact(x)
        if not _allowed(self, x) or (
            compact and self.live_in is not None and x.shape[1] != len(self.live_in)
        ):
            return None
        key = conv_ways.kind_of(x, weight, bias, gate, compact)
        needs, last = key[-3], key[-2]
        if last != conv_ways.channels_last(x):  # it would be copied
            return None
        choice = self.verdicts.get(key, (0, ALL_PLAIN))[1]
        parts = (True, needs[0], any(needs[1:]))
        ways = {way for way, part in zip(choice, parts, strict=True) if part}
        return (self.call(compact), ways.pop()) if len(ways) == 1 and PLAIN not in ways else None

    def left_out(self, narrow: bool) -> float:
        """See :meth:`DeadChannelSkipper.left_out`; ``narrow``: the maps of the step held live channels only."""
        if narrow and (self.live_in is not None or self.live_out is not None):
            return 1.0 - self.share
        # Of maps that hold all channels, in training.
        known = [verdict for kind, verdict in self.verdicts.items() if kind[1] is not True and any(kind[-3])]
        if not known:
            return 0.0
        _, newest = min(known, key=lambda verdict: verdict[0])
        return (1.0 - self.share) * (sum(way == SKIP for way in newest) / len(newest))


class DeadChannelSkipper:
    """Runs convolutions by the compiled kernels, over live channels only, where that is measured to be faster.

    Two hooks on each convolution exchange its inner call for ``masked_conv2d``: Winograd for 3x3 at stride 1 in float32,
    and only over live channels once some are dead. The first batch, and the first after a tenth of a layer's work has died,
    is computed every way: forward, gradient of the input and gradient of the weight are chosen separately. Once leaving
    channels out has won it stays, since it only becomes cheaper. The plain call remains in evaluation while nothing is dead,
    under autocast, in ``torch.compile``, under a dispatch mode (flop counters), for dtypes that the kernel does not take,
    with ``torch.use_deterministic_algorithms`` (the choice depends on the clock, and rounding on the choice), and without
    the compiled extension.

    With example inputs, maps between the modules hold live channels only once some are dead: see
    :class:`lightning_prune.live_maps.LiveMaps`. :attr:`obstacle` says why they do not. On CUDA a few dead channels stay in
    each group, so that their number is a multiple of 8, which the vendor's kernels want. There this goes for autocast too:
    convolutions of live channels are the vendor's.

    Args:
        model: on its device; has hooks from now on, loses them in :meth:`detach`.
        graph: its traced channels.
        inputs: an example for ``forward``.
        steps: in so many equal steps a layer's work may die, and after each it is compared anew.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        inputs: ExampleInputs | None = None,
        _trusted: bool = False,
        *,
        steps: int = 10,
    ) -> None:
        self._model, self._steps = model, steps
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}
        devices = {p.device for p in model.parameters()}
        self._device = devices.pop() if len(devices) == 1 else torch.device("meta")
        kernels = self._device.type == "cpu" or (self._device.type == "cuda" and cuda_built())
        self._inputs = inputs if kernels else None
        self._differs = False
        self._attach(graph)
        if self.obstacle is None and not _trusted and self._inputs is not None:
            self._differs = not _agree(model, graph, self._inputs)
            self._keep_full_maps()

    def _attach(self, graph: ChannelGraph) -> None:
        self._attached, self._graph = True, graph
        self._due: Mask | None = None
        self._layers = _layers(self._model, graph, self._steps) if extension_available() else []
        self._norms = FusedNorms(self._model, {layer.module for layer in self._layers})
        for layer in self._layers:
            exchange, restore = layer.hooks = _Exchange(layer), _Restore()
            self._handles[layer.module] = [
                layer.module.register_forward_pre_hook(exchange),
                layer.module.register_forward_hook(restore, always_call=True),
            ]
            layer.module.__dict__[PAIRED] = Marker(layer)
            if layer.module.groups == 1:
                layer.module.__dict__[TAKES_GATES] = Marker()
        self._norm_channels = norm_channels(self._model, graph, self._norms.norms())
        self._maps: LiveMaps | None = None
        if self._inputs is not None and self._layers:
            names, _ = whole_network_calls(self._model, self._inputs)
            modules = dict(self._model.named_modules())
            known = [*(layer.module for layer in self._layers), *self._norms.norms()]
            self._maps = LiveMaps(self._model, graph, known, [modules[name] for name in names])
            self._keep_full_maps()

    def _keep_full_maps(self) -> None:
        if self._differs and self._maps is not None:
            self._maps.obstacle = "the network computes something else with fewer channels"

    @property
    def obstacle(self) -> str | None:
        """Why maps between modules hold dead channels too, None where they do not."""
        if self._maps is not None:
            return self._maps.obstacle
        return "no example input was given, or no kernels for the device of the network were built"

    def follow(self, graph: ChannelGraph) -> None:
        """The model's tensors have been cut, or are whole again: compare anew. :meth:`set_mask` has to be called."""
        if self._attached:
            self.detach()
            self._attach(graph)

    def next_step(self) -> None:
        """No graph of an earlier step will be walked any more: take up what has been found or set since.

        Checkpointed parts of the network are computed again in the backward pass, and have to save the same tensors then.
        """
        if self._due is not None:
            self.set_mask(self._due)
        for layer in self._layers:
            layer.next_step()
        if self._maps is not None:
            self._maps.full()

    def set_mask(self, mask: Mask, now: bool = True) -> None:
        """Skip the channels where ``mask`` (bool, shape [num_channels]) is False; their weights must be zero.

        ``now``: else at :meth:`next_step`.
        """
        self._due = None if now else mask
        if not now:
            return
        if self._device.type == "cuda":
            mask = aligned_groups(mask, self._graph, self._layers)
        if not self._attached:  # what is known of the layers may be of other sizes
            return
        wanted = self._maps.wanted if self._maps is not None else lambda: False
        for layer in self._layers:
            layer.set_mask(mask)
            layer.wanted = wanted
            layer.module.__dict__[LIVE_INPUTS] = Marker(layer.live_in)
        live = np.append(mask, True)
        for norm, channels in self._norm_channels.items():
            self._norms.set_live(norm, live_indices(live[channels], self._device), wanted)
        if self._maps is not None:
            outs = [live[layer.out_channels] for layer in self._layers]
            self._maps.set_mask(mask, float(np.concatenate(outs).mean()))

    def skipping(self) -> list[nn.Conv2d]:
        """Convolutions of which some part has been measured to be faster by the compiled kernel."""
        return [layer.module for layer in self._layers if any(any(c) for _, c in layer.verdicts.values())]

    def left_out(self) -> Iterator[tuple[nn.Conv2d, float]]:
        """Convolutions, and the share of its multiply-accumulates that each has left out in the step that is under way."""
        narrow = self._maps is not None and self._maps.narrow
        return ((layer.module, layer.left_out(narrow)) for layer in self._layers)

    def detach(self) -> None:
        """Remove the hooks; the model is exactly as it was."""
        self._attached = False
        if self._maps is not None:
            self._maps.detach()
        self._norms.detach()
        for module in list(self._handles):
            for handle in self._handles.pop(module):
                handle.remove()
            for name in ("_conv_forward", TAKES_GATES, IN_GATE, LIVE_INPUTS, PAIRED):
                module.__dict__.pop(name, None)
        release_maps()


class _Exchange(PrivateHook):
    """Before the forward call: put another convolution in place, which is the plain one where it is not allowed or faster."""

    def __init__(self, layer: _Layer) -> None:
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        layer = self._layer
        if "_conv_forward" not in module.__dict__:
            # The gate is looked up in the call: other hooks may come after this one.
            module.__dict__["_conv_forward"] = lambda x, weight, bias: _convolve(
                layer, x, weight, bias, layer.module.__dict__.get(IN_GATE)
            )


class _Restore(PrivateHook):
    """After the forward call, also after one that raised: as it was."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            module.__dict__.pop("_conv_forward", None)


def _allowed(layer: _Layer, x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dim() != 4 or only_plain_calls(x.device.type):
        return False
    conv = layer.module
    if (
        layer.share == 1.0 and not conv.training
    ):  # the dense network is validated and timed as the user wrote it
        return False
    outputs = x.shape[0] * x.shape[2] * x.shape[3] * conv.weight.numel() // (conv.stride[0] * conv.stride[1])
    return outputs >= LEAST_MACS and can_run_masked_conv2d(x, conv.weight).ok


def _convolve(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> Tensor:
    plain = type(layer.module)._conv_forward
    compact, allowed = layer.compact(x), _allowed(layer, x)
    if compact and layer.live_in is not None and x.shape[1] != len(layer.live_in):
        x = x.index_select(1, layer.live_in)
    call = layer.call(compact)
    if not allowed:
        if compact:
            return conv_ways.plain(x, weight, bias, gate, call)
        return plain(layer.module, x, conv_ways.gated(weight, gate), bias)
    key = conv_ways.kind_of(x, weight, bias, gate, compact)
    needs, last = key[-3], key[-2]
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    step = math.ceil(layer.share * layer.steps)
    measured, choice = layer.verdicts.get(key, (layer.steps + 1, ALL_PLAIN))
    if (compact or choice != (SKIP, SKIP, SKIP)) and step < measured:
        found = _measure(layer, call, needs, x, weight, bias, gate)
        if not compact:
            found = Choice(*(SKIP if old == SKIP else new for old, new in zip(choice, found, strict=True)))
        choice = found
        layer.verdicts[key] = (step, choice)
    if compact or any(choice):
        result: Tensor = SkippedConv.apply(x, weight, bias, gate, call, choice)
        return result.contiguous(memory_format=torch.channels_last) if last else result
    return plain(layer.module, x, conv_ways.gated(weight, gate), bias)


def _measure(layer: _Layer, call: ConvCall, *arguments: Any) -> Choice:
    """Each part in the way that the clock says, of those that are possible."""
    # Leaving out a few channels can cost more than it saves: vectors have 8 or 16 of them.
    ways = (PLAIN, SKIP) if call.compact else (PLAIN, FULL) if layer.share == 1.0 else (PLAIN, SKIP, FULL)
    return conv_ways.measure(ways, call, *arguments)


def _layers(model: nn.Module, graph: ChannelGraph, steps: int) -> list[_Layer]:
    """Every plain convolution, with the channels of its rows and columns."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for module in model.modules():
        if type(module) is not nn.Conv2d or id(module.weight) not in names:
            continue
        try:
            padding = symmetric_padding(module)
        except ValueError:
            continue
        name = names[id(module.weight)]
        if name not in graph.tensors:
            continue
        rows, columns = graph.positions(name, 0), graph.positions(name, 1)
        found.append(_Layer(module, rows, np.tile(columns, module.groups), padding, steps))
    return found


def _agree(model: nn.Module, graph: ChannelGraph, inputs: ExampleInputs) -> bool:
    """Whether a copy of the network, half of whose channels are dead, computes the same with maps of live channels only."""
    generator = np.random.default_rng(0)
    mask = generator.random(graph.num_channels) < 0.5
    for group in graph.groups:
        mask[group.start + generator.integers(group.size)] = True
    if next(
        model.parameters()
    ).is_cuda:  # the code is in question and not the kernels, which may compute in tf32
        model = clone_model(model).cpu()
        inputs = to_model(inputs, model, floating_dtype(model))
    try:
        masked = mask_channels(model, inputs, CompactionPlan.from_mask(graph, mask))
        narrow = clone_model(masked)
        skipper = DeadChannelSkipper(narrow, graph, inputs, _trusted=True)
        assert skipper._maps is not None
        skipper.set_mask(mask)
        skipper._maps.always = True
        return max_relative_error(masked, narrow, inputs) < _AGREEMENT
    except Exception:  # whatever the user's code makes of fewer channels
        return False
