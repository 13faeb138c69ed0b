"""A convolution and the batch norm that alone reads it as one operator, in a training step.

With few live channels calling two operators, through two modules and two nodes of autograd's graph, takes longer than what
they compute. Which kernels compute the two is decided apart; where both have been decided for the compiled ones, the calls of
the next step are one.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import conv_ways, norm_ways
from .conv_ways import ConvCall
from .derivatives import differentiable
from .gates.attach import GateHooks
from .hooks import SLOT
from .ops.availability import extension_available

#: the value of this mark on a convolution is a :class:`Convolution`
PAIRED = "_paired"
_FUNCTORCH = torch._C._are_functorch_transforms_active
_NEEDS = 7  #: tensors that have gradients


class Convolution(Protocol):
    """What is known of a convolution.

    Attributes:
        pairs: kind of call -> how it is computed together with the norm, None: apart. Whoever changes what lives clears it.
        new_pairs: what is to be added to ``pairs`` when the next step begins: parts that are checkpointed are computed twice in
            one step, and both times alike.
        hooks: those on the module that do nothing but choose its kernel.
        heard: keys of the hooks on the module, whether those beside ``hooks`` are gates, and whose; None: not looked at yet.
    """

    pairs: dict[tuple[Any, ...], Pair | None]
    new_pairs: dict[tuple[Any, ...], Pair | None]
    hooks: tuple[Any, ...]
    heard: tuple[tuple[int, ...], bool, GateHooks | None] | None

    def compact(self, x: Any) -> bool:
        """Whether the maps hold live channels only."""

    def one_way(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
    ) -> tuple[ConvCall, int] | None:
        """The call and the one compiled way that all of its parts take; None if they do not, or it is not known yet."""


#: running mean, running variance and number of batches, None for those that there are not
Statistics = tuple[Tensor | None, Tensor | None, Tensor | None]


class Pair(NamedTuple):
    """How a convolution and its norm are computed in one call.

    Attributes:
        call: the convolution of the whole parameters.
        narrow: whether the operator is given their live part alone.
        compact: whether maps hold live channels only while the operator is given whole parameters.
        lists: the channels that it computes, of what it is given.
        geometry: stride, padding, dilation and groups in a row, of what it is given.
        live: channels of the norm that its map holds, of ``compact_of``; None and 0 for all.
        statistics: those that it moves.
    """

    call: ConvCall
    narrow: bool
    compact: bool
    lists: tuple[Tensor | None, Tensor | None]
    geometry: list[int]
    live: Tensor | None
    compact_of: int
    statistics: Statistics


class Site(NamedTuple):
    """One call: what is ``known`` of the convolution, the kind of call, what :func:`together` takes, and how; None: not yet."""

    known: Convolution
    kind: tuple[Any, ...]
    tensors: tuple[Any, ...]
    pair: Pair | None


def pair_of(
    call: ConvCall,
    way: int,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    live: Tensor | None,
    compact_of: int,
    statistics: Statistics,
) -> Pair:
    """A convolution by ``way`` and a norm whose map holds ``live`` of ``compact_of`` channels, as one call."""
    narrow, own = not conv_ways.takes_whole(weight, call), call
    if narrow:
        with torch.no_grad():
            own = conv_ways.narrowed(weight, bias, gate, call)[3]
    geometry = [*own.stride, *own.padding, *own.dilation, own.groups]
    return Pair(call, narrow, own.compact, own.lists(way), geometry, live, compact_of, statistics)


def gate_of(conv: nn.Module, known: Convolution) -> tuple[bool, Tensor | None]:
    """Whether nobody but gates takes part in the module's call, and the gate on its inputs, shape [inputs] or None."""
    own = conv.__dict__
    if "forward" in own or "_conv_forward" in own or "weight" in own or own.get(SLOT) is not None:
        return False, None
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False, None
    before, after = own["_forward_pre_hooks"], own["_forward_hooks"]
    keys = (*before, 0, *after)  # no two hooks have the same key
    if known.heard is None or known.heard[0] != keys:
        hooks = [hook for hook in (*before.values(), *after.values()) if hook not in known.hooks]
        owners = {getattr(hook, "__self__", None) for hook in hooks}
        alone = len(owners) <= 1 and all(isinstance(owner, GateHooks) for owner in owners)
        known.heard = keys, alone, owners.pop() if alone and owners else None
    _, alone, gates = known.heard
    return (alone, None) if gates is None else gates.gate(conv)


def kind_of(known: Convolution, tensors: tuple[Tensor | None, ...], activation: str) -> tuple[Any, ...]:
    """What a call depends on: all that decides about kernels, and which tensors there are and need gradients.

    ``tensors``: as :func:`together` takes them.
    """
    x, weight, bias, gate, scale, shift, residual = tensors
    assert x is not None
    assert weight is not None
    return (
        x.shape, x.stride(), x.dtype, known.compact(x), activation, torch.is_grad_enabled(),
        x.requires_grad, weight.requires_grad,
        bias if bias is None else bias.requires_grad, gate if gate is None else gate.requires_grad,
        scale if scale is None else scale.requires_grad, shift if shift is None else shift.requires_grad,
        residual if residual is None else (residual.shape, residual.stride(), residual.requires_grad),
    )  # fmt: skip


def together(pair: Pair, norm: nn.BatchNorm2d, activation: str, *tensors: Tensor | None) -> Tensor:
    """The activation of the norm, and of the residual if there is one.

    ``tensors``: x, weight, bias and gate of the convolution, weight and bias of the norm, residual.
    """
    # Function.apply looks into every argument for what torch.func wraps.
    apply = ConvNorm.apply if _FUNCTORCH() else _APPLY
    result: Tensor = apply(*tensors, pair, norm, activation)
    return result


class ConvNorm(torch.autograd.Function):
    """The operator; its second derivative, where one is asked for, is that of torch's functions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        pair: Pair,
        norm: nn.BatchNorm2d,
        activation: str,
    ) -> Tensor:
        """Shapes as the modules have them; records running statistics."""
        own: tuple[Tensor, Tensor | None, Tensor | None] = (weight, bias, gate)
        if pair.narrow:
            own = conv_ways.narrowed(weight, bias, gate, pair.call)[:3]
        statistics = pair.statistics
        with torch._C._AutoDispatchBelowAutograd():
            y, middle, mean, var = _FORWARD(
                x, *own, *pair.lists, pair.compact, pair.geometry, residual, scale, shift, pair.live, pair.compact_of,
                norm.eps, activation, *statistics, norm.momentum,
            )  # fmt: skip
        if statistics[0] is not None:  # what saved them for its backward pass has to see that they changed
            torch.autograd.graph.increment_version([t for t in statistics if t is not None])
        live = own if pair.narrow else ()
        ctx.save_for_backward(x, weight, bias, gate, scale, shift, residual, middle, mean, var, *live)
        ctx.settings = pair, norm.eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """All parts at once."""
        x, weight, bias, gate, scale, shift, residual, middle, mean, var, *own = ctx.saved_tensors
        pair, eps, activation = ctx.settings
        (grad,) = grads
        needs = ctx.needs_input_grad[:_NEEDS]
        if torch.is_grad_enabled():
            compute = partial(_plain, pair, eps, activation)
            return (*differentiable(compute, ctx.saved_tensors[:_NEEDS], needs, grad), None, None, None)
        wanted = sum(need << bit for bit, need in enumerate(needs))
        with torch._C._AutoDispatchBelowAutograd():
            found = _BACKWARD(
                grad, middle, mean, var, x, *(own or (weight, bias, gate)), *pair.lists, pair.compact, pair.geometry, residual,
                scale, shift, pair.live, pair.compact_of, eps, activation, wanted,
            )  # fmt: skip
        if own:
            found = (*conv_ways.widened(found[:4], weight, bias, gate, pair.call, needs[:4]), *found[4:])
        return (*[g if need else None for g, need in zip(found, needs, strict=True)], None, None, None)


def _plain(pair: Pair, eps: float, activation: str, *tensors: Any) -> Tensor:
    """The output by torch's functions."""
    x, weight, bias, gate, scale, shift, residual = tensors
    middle = conv_ways.plain(x, weight, bias, gate, pair.call)
    return norm_ways.plain(middle, scale, shift, residual, eps, activation, pair.live)


_APPLY: Any = super(torch.autograd.Function, ConvNorm).apply
_FORWARD: Any = None
_BACKWARD: Any = None
if extension_available():
    _FORWARD = torch.ops.lightning_prune.masked_conv_norm_act.default
    _BACKWARD = torch.ops.lightning_prune.masked_conv_norm_act_backward.default
