"""Fake kernels, autograd and autocast of ``masked_batch_norm_act``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prune.ops.reference_norm import vector_dtype

NAME = "lightning_prune::masked_batch_norm_act"


def _map(x: Tensor, wanted: bool = True) -> Tensor:
    """An uninitialised map laid out as the kernel's: channels_last or contiguous."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    shape = x.shape if wanted else (0, 0, 0, 0)
    return torch.empty(
        shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of the operator's outputs."""
    channels, dtype = _channels(x, rest, 9), vector_dtype(x)
    return _map(x), x.new_empty((channels,), dtype=dtype), x.new_empty((channels,), dtype=dtype)


def backward_fake(grad_y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Shapes of the gradients."""
    channels, needs = _channels(x, rest, 15), rest[10:15]
    vectors = (x.new_empty((channels if need else 0,), dtype=vector_dtype(x)) for need in needs[2:])
    return (_map(x, needs[0]), _map(x, needs[1]), *vectors)


def _channels(x: Tensor, rest: tuple[Any, ...], position: int) -> Any:
    """Length of the vectors: the last argument, ``compact_of``, if it is given and not zero."""
    return (rest[position] if len(rest) > position else 0) or x.shape[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, gate, mean, _, live, eps, activation, compact_of = inputs
    _, used_mean, used_var = output
    ctx.mark_non_differentiable(used_mean, used_var)
    ctx.save_for_backward(
        x, residual if activation != "none" else None, weight, bias, gate, used_mean, used_var, live
    )
    ctx.settings = (mean is None, eps, activation, compact_of)
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad_y: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    x, residual, weight, bias, gate, mean, var, live = ctx.saved_tensors
    training, eps, activation, compact_of = ctx.settings
    needs = list(ctx.needs_input_grad[:5])
    if residual is None and needs[1]:  # without an activation its gradient is the output's
        needs[1] = False
    grads = torch.ops.lightning_prune.masked_batch_norm_act_backward(
        grad_y,
        x,
        residual,
        weight,
        bias,
        gate,
        mean,
        var,
        live,
        training,
        eps,
        activation,
        *needs,
        compact_of,
    )
    found = [g if need else None for g, need in zip(grads, needs, strict=True)]
    if ctx.has_residual and residual is None and ctx.needs_input_grad[1]:
        found[1] = grad_y
    return (*found, None, None, None, None, None, None)


def _no_second_order(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(
        "masked_batch_norm_act has no second derivative; lightning_prune.ops.reference_norm.masked_batch_norm_act has one"
    )


def register() -> None:
    """Register what belongs to the operator beside its kernels; called once, when the library has loaded."""
    library = torch.library
    library.register_fake(NAME, fake)
    library.register_fake(f"{NAME}_backward", backward_fake)
    library.register_fake("lightning_prune::record_moments", lambda *arguments: None)
    library.register_autograd(NAME, _backward, setup_context=_setup_context)
    library.register_autograd(f"{NAME}_backward", _no_second_order)
    # The CUDA kernels take half maps with float32 parameters as they are.
    library.register_autocast(NAME, "cpu", torch.float32)
