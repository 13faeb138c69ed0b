"""Convolutions by faster kernels while a network trains: Winograd where it fits, and without dead channels.

A dead channel's weights are zero, so leaving it out gives the same numbers. The parameters keep their full size: only the
call of the convolution changes, during the module's own forward, on top of whatever shadows its weight there (gates).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.hooks import RemovableHandle

from .channels.groups import ChannelGraph, Mask
from .fused_norms import FusedNorms
from .gates.attach import IN_GATE, TAKES_GATES
from .hooks import PrivateHook
from .nn._convert import symmetric_padding
from .ops.availability import can_run_masked_conv2d, extension_available
from .timing import fastest

#: smaller convolutions (multiply-accumulates of one dense forward call) are left alone
LEAST_MACS = 1_000_000


#: Ways to compute one part of a convolution: by torch, by the compiled kernel over live channels, by it over all of them.
PLAIN, SKIP, FULL = 0, 1, 2


class Choice(NamedTuple):
    """How each part of a convolution is computed."""

    forward: int
    grad_x: int
    grad_weight: int


_PLAIN = Choice(PLAIN, PLAIN, PLAIN)


@dataclass
class _Layer:
    """A convolution and what is dead of it at present.

    Attributes:
        module: the convolution.
        out_channels: channel of each output, -1 for none; likewise ``in_channels``.
        padding: two integers.
        live_in: int64 inputs that live, None for all; likewise ``live_out``.
        share: of the multiply-accumulates that live.
        verdicts: kind of call -> decile of ``share`` at which it was measured, and what came out.
    """

    module: nn.Conv2d
    out_channels: np.ndarray
    in_channels: np.ndarray
    padding: tuple[int, int]
    live_in: Tensor | None = None
    live_out: Tensor | None = None
    share: float = 1.0
    verdicts: dict[tuple[Any, ...], tuple[int, Choice]] = field(default_factory=dict)

    def set_mask(self, mask: Mask) -> None:
        """Take up which channels live, bool of shape [num_channels]."""
        live = np.append(mask, True)  # position -1: belongs to no channel
        ins, outs = live[self.in_channels], live[self.out_channels]
        device = self.module.weight.device
        self.live_in = None if ins.all() else torch.from_numpy(np.flatnonzero(ins)).to(device)
        self.live_out = None if outs.all() else torch.from_numpy(np.flatnonzero(outs)).to(device)
        depthwise = self.module.groups > 1 and self.module.groups == self.module.in_channels
        self.share = float(outs.mean() * (1.0 if depthwise else ins.mean()))

    @property
    def settings(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as the operators take them."""
        conv = self.module
        return list(conv.stride), list(self.padding), list(conv.dilation), conv.groups


class _MaskedConv(torch.autograd.Function):
    """``masked_conv2d`` whose second derivative, where one is asked for, is that of the plain convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        layer: _Layer,
        choice: Choice,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gate)
        ctx.live, ctx.settings, ctx.choice = (layer.live_in, layer.live_out), layer.settings, choice
        return _forward(x, weight, bias, gate, ctx.live, ctx.settings, choice.forward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gate = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            leaves = [t for t, need in zip((x, weight, bias, gate), needs, strict=True) if need]
            stride, padding, dilation, groups = ctx.settings
            y = F.conv2d(x, _gated(weight, gate), bias, stride, padding, dilation, groups)
            found = iter(torch.autograd.grad(y, leaves, grad, create_graph=True))
            return (*(next(found) if need else None for need in needs), None, None)
        arguments = (grad, x, weight, bias, gate, ctx.live, ctx.settings)
        if ctx.choice.grad_x == ctx.choice.grad_weight:
            grads = _backward(*arguments, needs, ctx.choice.grad_x)
        else:
            grad_x = _backward(*arguments, (needs[0], False, False, False), ctx.choice.grad_x)[0]
            grads = (grad_x, *_backward(*arguments, (False, *needs[1:]), ctx.choice.grad_weight)[1:])
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


def _gated(weight: Tensor, gate: Tensor | None) -> Tensor:
    return weight if gate is None else weight * gate[:, None, None]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    live: Any,
    settings: Any,
    way: int = SKIP,
) -> Tensor:
    if way == PLAIN:
        stride, padding, dilation, groups = settings
        return F.conv2d(x, _gated(weight, gate), bias, stride, padding, dilation, groups)
    result: Tensor = torch.ops.lightning_prune.masked_conv2d(
        x, weight, bias, None, *_lists(live, way), *settings, "none", "auto", gate
    )
    return result


def _lists(live: Any, way: int) -> Any:
    return live if way == SKIP else (None, None)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    live: Any,
    settings: Any,
    needs: tuple[bool, ...],
    way: int = SKIP,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and gate; whatever is not needed is not to be read."""
    if not any(needs):
        return grad, grad, grad, grad
    need_x, need_weight, need_bias, need_gate = needs
    if way != PLAIN:
        found: tuple[Tensor, ...] = torch.ops.lightning_prune.masked_conv2d_backward(
            grad, None, x, weight, bias, None, *_lists(live, way), *settings, "none",
            need_x, need_weight, need_bias, False, "auto", gate, need_gate,
        )  # fmt: skip
        return (*found[:3], found[4])
    stride, padding, dilation, groups = settings
    sizes = None if bias is None else list(bias.shape)
    wanted = [need_x, need_weight or need_gate, need_bias]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, _gated(weight, gate), sizes, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    grad_gate = (grad_weight * weight).sum((0, 2, 3)) if need_gate else grad
    return grad_x, _gated(grad_weight, gate) if need_weight else grad, grad_bias, grad_gate


class DeadChannelSkipper:
    """Runs convolutions by the compiled kernels, over live channels only, where that is measured to be faster.

    Two hooks on each convolution exchange its inner call for ``masked_conv2d``: Winograd for 3x3 at stride 1 in float32,
    and only over live channels once some are dead. The first batch, and the first after a tenth of a layer's work has died,
    is computed every way: forward, gradient of the input and gradient of the weight are chosen separately. Once leaving
    channels out has won it stays, since it only becomes cheaper. The plain call remains in evaluation while nothing is dead,
    under autocast, in ``torch.compile``, under a dispatch mode (flop counters), for dtypes that the kernel does not take,
    with ``torch.use_deterministic_algorithms`` (the choice depends on the clock, and rounding on the choice), and without
    the compiled extension.

    Args:
        model: on its device; has hooks from now on, loses them in :meth:`detach`.
        graph: its traced channels.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self._model = model
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}
        self._attach(graph)

    def _attach(self, graph: ChannelGraph) -> None:
        self._attached = True
        self._layers = _layers(self._model, graph) if extension_available() else []
        self._norms = FusedNorms(self._model)
        for layer in self._layers:
            self._handles[layer.module] = [
                layer.module.register_forward_pre_hook(_Exchange(layer)),
                layer.module.register_forward_hook(_Restore(), always_call=True),
            ]
            if layer.module.groups == 1:
                layer.module.__dict__[TAKES_GATES] = _Marker()

    def follow(self, graph: ChannelGraph) -> None:
        """The model's tensors have been cut, or are whole again: compare anew. :meth:`set_mask` has to be called."""
        if self._attached:
            self.detach()
            self._attach(graph)

    def set_mask(self, mask: Mask) -> None:
        """Skip the channels where ``mask`` (bool, shape [num_channels]) is False; their weights must be zero."""
        for layer in self._layers:
            layer.set_mask(mask)

    def skipping(self) -> list[nn.Conv2d]:
        """Convolutions of which some part has been measured to be faster by the compiled kernel."""
        return [layer.module for layer in self._layers if any(any(c) for _, c in layer.verdicts.values())]

    def detach(self) -> None:
        """Remove the hooks; the model is exactly as it was."""
        self._attached = False
        self._norms.detach()
        for module in list(self._handles):
            for handle in self._handles.pop(module):
                handle.remove()
            for name in ("_conv_forward", TAKES_GATES, IN_GATE):
                module.__dict__.pop(name, None)


class _Marker:
    """Says that the module's gates are taken; a copy of the module has None in its place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return type(None), ()


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
    if not isinstance(x, Tensor) or x.dim() != 4 or torch.is_autocast_enabled(x.device.type):
        return False
    if torch.are_deterministic_algorithms_enabled() or torch.jit.is_tracing():
        return False
    if (
        _get_current_dispatch_mode() is not None
    ):  # somebody watches the operators: the comparison is not theirs
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
    if not _allowed(layer, x):
        return plain(layer.module, x, _gated(weight, gate), bias)
    leaves = (x, weight, bias, gate)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves)
    last = _channels_last(x) or _channels_last(weight)  # the vendor's result is in channels_last if either is
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    key = (tuple(x.shape), x.dtype, needs, last, gate is None)
    decile = int(layer.share * 10)
    measured, choice = layer.verdicts.get(key, (11, _PLAIN))
    if choice != (SKIP, SKIP, SKIP) and decile < measured:
        found = _measure(layer, x, weight, bias, gate, needs)
        choice = Choice(*(SKIP if old == SKIP else new for old, new in zip(choice, found, strict=True)))
        layer.verdicts[key] = (decile, choice)
    if any(choice):
        result: Tensor = _MaskedConv.apply(x, weight, bias, gate, layer, choice)
        return result.contiguous(memory_format=torch.channels_last) if last else result
    return plain(layer.module, x, _gated(weight, gate), bias)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@torch.no_grad()
def _measure(
    layer: _Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    needs: tuple[bool, ...],
) -> Choice:
    """Time each part both ways on this batch, without autograd (nothing is recorded, no hook of the user's sees it)."""
    x, weight = x.detach(), weight.detach()
    bias, gate = (None if t is None else t.detach() for t in (bias, gate))
    arguments = (x, weight, bias, gate, (layer.live_in, layer.live_out), layer.settings)
    y = _forward(*arguments)
    # Leaving out a few channels can cost more than it saves: vectors have 8 or 16 of them.
    ways = (PLAIN, FULL) if layer.share == 1.0 else (PLAIN, SKIP, FULL)
    parts: list[Callable[[int], Any] | None] = [lambda way: _forward(*arguments, way)]
    for part in ((needs[0], False, False, False), (False, *needs[1:])):
        run = partial(_backward, y, *arguments, part)
        parts.append(run if any(part) else None)
    # What nobody asks for is never computed and need not be measured again.
    return Choice(*(SKIP if run is None else fastest(run, ways, x.device) for run in parts))


def _layers(model: nn.Module, graph: ChannelGraph) -> list[_Layer]:
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
        found.append(_Layer(module, rows, np.tile(columns, module.groups), padding))
    return found
