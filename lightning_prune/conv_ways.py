"""The ways to compute a convolution of which some channels are dead, forward and backward, under autograd; which is fastest.

Of maps of live channels only it is, on the CPU, the dense convolution of a smaller weight, the live rows and columns side by
side: they are copied once per step, and the gradient is spread over the whole weight with its zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .derivatives import differentiable
from .ops.availability import can_run_masked_conv2d
from .reused_memory import ReusedMemory
from .timing import fastest

#: Ways to compute one part of a convolution: by torch, by the compiled kernel over live channels, by it over all of them.
PLAIN, SKIP, FULL = 0, 1, 2


class Choice(NamedTuple):
    """How each part of a convolution is computed."""

    forward: int
    grad_x: int
    grad_weight: int


ALL_PLAIN = Choice(PLAIN, PLAIN, PLAIN)
#: elements of a weight whose live part the kernel copies anew in every call, which takes less time than another call
_SMALL = 40_000
#: in a step torch's kernels take so many times as long as alone on the CPU: their results lie in fresh memory every time
_FRESH_MEMORY = 1.3


@dataclass(frozen=True)
class ConvCall:
    """What a convolution is beside its tensors.

    Attributes:
        stride, padding, dilation: two integers each.
        groups: as in ``torch.nn.functional.conv2d``.
        live_in: int64 inputs that live, None for all; likewise ``live_out``.
        compact: the maps hold live channels only; else they hold all.
        memory: for the gradient of the whole weight.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    live_in: Tensor | None = None
    live_out: Tensor | None = None
    compact: bool = False
    memory: ReusedMemory | None = None

    @property
    def settings(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as the operators take them."""
        return self.stride, self.padding, self.dilation, self.groups

    def lists(self, way: int) -> tuple[Tensor | None, Tensor | None]:
        """The channels that the kernel is to compute."""
        return (self.live_in, self.live_out) if way == SKIP else (None, None)

    def columns(self, per_group: int) -> Tensor | None:
        """Columns of the weight that live: of a grouped convolution the same in every group."""
        live = self.live_in
        if live is None or self.groups == 1:
            return live
        return None if per_group == 1 else live[live < per_group]

    def kept_groups(self, per_group: int) -> int:
        """Groups of the convolution of live channels: a depthwise one loses some."""
        return (
            len(self.live_in)
            if per_group == 1 and self.groups > 1 and self.live_in is not None
            else self.groups
        )


def kind_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, compact: bool
) -> tuple[Any, ...]:
    """The kind of a call; before the last, whether it is in channels_last, and before that, what needs gradients."""
    leaves = (x, weight, bias, gate)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves)
    last = channels_last(x) or channels_last(weight)  # the vendor's result is in channels_last if either is
    # Compact maps change their width with every channel that dies: what was measured holds until the next step.
    return (len(x), compact or x.shape[1], *x.shape[2:], x.dtype, needs, last, gate is None)


def channels_last(tensor: Tensor) -> bool:
    """Whether a map or a weight is in channels_last and in no other format."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, call: ConvCall) -> Tensor:
    """By torch; differentiable to any order."""
    weight, bias, gate, groups = _sliced(weight, bias, gate, call)
    return F.conv2d(x, gated(weight, gate), bias, call.stride, call.padding, call.dilation, groups)


def gated(weight: Tensor, gate: Tensor | None) -> Tensor:
    """``weight`` with its columns multiplied by ``gate``, one factor per input."""
    if gate is None:
        return weight
    return weight * gate[:, None, None]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, call: ConvCall, way: int = SKIP
) -> Tensor:
    """The output, computed in the given way."""
    if way == PLAIN:
        return plain(x, weight, bias, gate, call)
    with torch._C._AutoDispatchBelowAutograd():  # the derivative is SkippedConv's
        result: Tensor = torch.ops.lightning_prune.masked_conv2d.default(
            x, weight, bias, None, *call.lists(way), *call.settings, "none", "auto", gate, call.compact
        )
    return result


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    call: ConvCall,
    needs: tuple[bool, ...],
    way: int = SKIP,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and gate; whatever is not needed is not to be read."""
    if not any(needs):
        return grad, grad, grad, grad
    need_x, need_weight, need_bias, need_gate = needs
    if way != PLAIN:
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[Tensor, ...] = torch.ops.lightning_prune.masked_conv2d_backward.default(
                grad, None, x, weight, bias, None, *call.lists(way), *call.settings, "none",
                need_x, need_weight, need_bias, False, "auto", gate, need_gate, call.compact,
            )  # fmt: skip
        return (*found[:3], found[4])
    own, own_bias, own_gate, groups = _sliced(weight, bias, gate, call)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        gated(own, own_gate),
        None if own_bias is None else list(own_bias.shape),
        call.stride,
        call.padding,
        call.dilation,
        False,
        [0, 0],
        groups,
        [need_x, need_weight or need_gate, need_bias],
    )
    grad_gate = (grad_weight * own).sum((0, 2, 3)) if need_gate else grad
    grad_weight = gated(grad_weight, own_gate) if need_weight else grad
    if call.compact:
        return widened((grad_x, grad_weight, grad_bias, grad_gate), weight, bias, gate, call, needs)
    return grad_x, grad_weight, grad_bias, grad_gate


def takes_whole(weight: Tensor, call: ConvCall) -> bool:
    """Whether the compiled kernel is given the whole weight, and copies what lives of it in every call."""
    return not call.compact or (call.groups == 1 and weight.numel() <= _SMALL)


def narrowed(
    weight: Tensor, bias: Tensor | None, gate: Tensor | None, call: ConvCall
) -> tuple[Tensor, Tensor | None, Tensor | None, ConvCall]:
    """What belongs to the channels of compact maps, without autograd, and the dense convolution of it."""
    if _in_blocks(weight, call):
        with torch._C._AutoDispatchBelowAutograd():
            own = torch.ops.lightning_prune.live_block.default(weight, call.live_out, call.live_in)
        groups = 1
        if bias is not None and call.live_out is not None:
            bias = bias.index_select(0, call.live_out)
        if gate is not None and call.live_in is not None:
            gate = gate.index_select(0, call.live_in)
    else:
        own, bias, gate, groups = _sliced(weight, bias, gate, call)
    return own, bias, gate, ConvCall(call.stride, call.padding, call.dilation, groups)


def widened(
    found: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    call: ConvCall,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Gradients of what :func:`narrowed` gives as those of the whole tensors: zero where nothing lives."""
    grad_x, grad_weight, grad_bias, grad_gate = found
    if needs[1]:
        grad_weight = _widened_weight(grad_weight, weight, call)
    if needs[2] and bias is not None:
        grad_bias = _spread(grad_bias, len(bias), call.live_out)
    if needs[3] and gate is not None:
        grad_gate = _spread(grad_gate, len(gate), call.live_in)
    return grad_x, grad_weight, grad_bias, grad_gate


def _in_blocks(weight: Tensor, call: ConvCall) -> bool:
    """Whether the compiled kernels copy the live part of a weight, and spread its gradient."""
    return call.groups == 1 and weight.device.type == "cpu" and can_run_masked_conv2d(weight, weight).ok


def _sliced(
    weight: Tensor, bias: Tensor | None, gate: Tensor | None, call: ConvCall
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """What belongs to the maps' channels, and the groups."""
    if not call.compact:
        return weight, bias, gate, call.groups
    per_group = weight.shape[1]
    columns = call.columns(per_group)
    if columns is not None:
        weight = weight.index_select(1, columns)
    if call.live_out is not None:
        weight = weight.index_select(0, call.live_out)
        bias = None if bias is None else bias.index_select(0, call.live_out)
    if gate is not None and call.live_in is not None:
        gate = gate.index_select(0, call.live_in)
    return weight, bias, gate, call.kept_groups(per_group)


def _widened_weight(grad: Tensor, weight: Tensor, call: ConvCall) -> Tensor:
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    if _in_blocks(weight, call) and (last or weight.is_contiguous()):
        return (call.memory or ReusedMemory()).spread(grad, weight, call.live_out, call.live_in)
    for dim, index in ((1, call.columns(weight.shape[1])), (0, call.live_out)):
        grad = _spread(grad, weight.shape[dim], index, dim)
    return grad.contiguous(memory_format=torch.channels_last) if last else grad.contiguous()


def _spread(grad: Tensor, size: int, index: Tensor | None, dim: int = 0) -> Tensor:
    """Slices along one dimension among zeros; None: all slices are there."""
    if index is None:
        return grad
    shape = list(grad.shape)
    shape[dim] = size
    return grad.new_zeros(shape).index_copy(dim, index, grad)


class SkippedConv(torch.autograd.Function):
    """``masked_conv2d`` whose second derivative, where one is asked for, is that of the plain convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        call: ConvCall,
        choice: Choice,
    ) -> Tensor:
        """Shapes as in ``torch.nn.functional.conv2d``; ``gate`` of shape [inputs] multiplies the inputs."""
        ctx.call, ctx.own_call, ctx.choice = call, call, choice
        if x.device.type != "cpu" or (PLAIN not in choice and takes_whole(weight, call)) or not call.compact:
            ctx.save_for_backward(x, weight, bias, gate)
            return forward(x, weight, bias, gate, call, choice.forward)
        own, own_bias, own_gate, ctx.own_call = narrowed(weight, bias, gate, call)
        ctx.save_for_backward(x, weight, bias, gate, own, own_bias, own_gate)
        return forward(x, own, own_bias, own_gate, ctx.own_call, choice.forward)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Each part as it was chosen."""
        x, weight, bias, gate, *live = ctx.saved_tensors
        (grad,) = grads
        call: ConvCall = ctx.call
        needs = tuple(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            compute = partial(plain, call=call)
            return (*differentiable(compute, (x, weight, bias, gate), needs, grad), None, None)
        own, own_bias, own_gate = live or (weight, bias, gate)
        arguments = (grad, x, own, own_bias, own_gate, ctx.own_call)
        if ctx.choice.grad_x == ctx.choice.grad_weight:
            found = backward(*arguments, needs, ctx.choice.grad_x)
        else:
            grad_x = backward(*arguments, (needs[0], False, False, False), ctx.choice.grad_x)[0]
            found = (grad_x, *backward(*arguments, (False, *needs[1:]), ctx.choice.grad_weight)[1:])
        if live:
            found = widened(found, weight, bias, gate, call, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None)


@torch.no_grad()
def measure(
    ways: tuple[int, ...],
    call: ConvCall,
    needs: tuple[bool, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
) -> Choice:
    """The fastest of the ``ways`` for each part, on this batch, without autograd: no hook of the user's sees it."""
    x, weight = x.detach(), weight.detach()
    bias, gate = (None if t is None else t.detach() for t in (bias, gate))
    if call.compact and x.device.type == "cpu":
        weight, bias, gate, call = narrowed(weight, bias, gate, call)
    arguments = (x, weight, bias, gate, call)
    y = forward(*arguments)
    parts: list[Callable[[int], Any] | None] = [lambda way: forward(*arguments, way)]
    for part in ((needs[0], False, False, False), (False, *needs[1:])):
        run = partial(backward, y, *arguments, part)
        parts.append(run if any(part) else None)
    handicap = _FRESH_MEMORY if x.device.type == "cpu" else 1.0
    # What nobody asks for is never computed and need not be measured again.
    return Choice(*(SKIP if run is None else fastest(run, ways, x.device, handicap) for run in parts))
