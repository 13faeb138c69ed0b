"""`masked_conv2d`: a trainable convolution that reads and computes live channels only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.ops import reference
from lightning_prune.ops.availability import can_run_masked_conv2d


def pair(value: int | Sequence[int]) -> list[int]:
    """One integer for both dimensions, or the two integers as given."""
    return [value, value] if isinstance(value, int) else list(value)


def _algorithm(exact: bool) -> str:
    return "direct" if exact else "auto"


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    live_in: Tensor | None = None,
    live_out: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    exact: bool = False,
) -> Tensor:
    """Convolution of full-size tensors whose dead channels cost nothing, forward and backward.

    ``y[:, o] = act(gate[o] * (conv(x restricted to live_in)[o] + bias[o]))`` for ``o`` in ``live_out``; exactly
    zero for the other outputs. Gradients of dead slices are exactly zero. Dead input channels are not read
    (they may hold NaN).

    Args:
        x: input, shape (N, C, H, W), float32 or float64; any strides. channels_last in, channels_last out.
        weight: shape (O, C / groups, kh, kw), dtype of x.
        bias: shape (O,) or None.
        gate: multiplier per output channel, shape (O,), or None.
        live_in: sorted unique int64 channels of x, or None for all.
        live_out: sorted unique int64 output channels, or None for all.
        stride: one or two integers.
        padding: one or two integers, zeros.
        dilation: one or two integers.
        groups: as in ``torch.nn.functional.conv2d``.
        activation: none, relu, relu6, silu, hardswish, gelu or sigmoid.
        exact: sum the products as the definition does, never by Winograd convolution.

    Returns:
        Tensor of shape (N, O, H', W').

    Raises:
        RuntimeError: a shape, dtype, device or index does not fit; the message has the expected and the actual value.
            (The fallback without the compiled extension raises ValueError or RuntimeError.)

    Index values are checked on the CPU; on CUDA a check would stall the stream, and indices out of range are skipped.
    Second derivatives are not implemented. Under autocast the operator runs in float32.

    Unless ``exact``, float32 convolutions on the CPU with a 3x3 kernel, stride, dilation and groups of 1, and at least 12 live
    inputs and outputs (4 or 5 where AVX-512 computes channels_last maps all of whose channels live) are computed by Winograd
    F(4x4, 3x3), on small maps F(2x2, 3x3); so are both gradients. float64 is always summed directly. Accuracy in float32
    against float64, before the activation: the output and the gradient of the input are within the bounds of ``direct``,
    ``winograd4`` and ``winograd2`` that :func:`lightning_prune.ops.compact_conv2d` states (for the gradient with outputs in
    the place of channels). The gradient of the weight adds over images and pixels, in parts: its error is usually at most 2e-6
    of the tensor's largest sum of absolute products, by any algorithm and for up to 65,536 pixels. For every input it is, of n
    pixels, at most ``n * 2**-24`` of that directly, and by a transform 16 (2x2) or 158 times ``(n + 32) * 2**-24`` of the
    largest ``|x|`` times the largest sum of ``|grad_y|`` of an output; equal products come to 2e-5 (torch's own gradient: to
    5e-4).
    """
    arguments = (pair(stride), pair(padding), pair(dilation), groups, activation)
    if can_run_masked_conv2d(x, weight).ok:
        return torch.ops.lightning_prune.masked_conv2d(
            x, weight, bias, gate, live_in, live_out, *arguments, _algorithm(exact)
        )
    return reference.masked_conv2d(x, weight, bias, gate, live_in, live_out, *arguments)


def masked_conv2d_backward(
    grad_y: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    live_in: Tensor | None = None,
    live_out: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`masked_conv2d` with respect to x, weight, bias and gate.

    Args:
        grad_y: gradient of the output, shape (N, O, H', W').
        saved: the forward output for relu, relu6 and sigmoid; the value before the activation for silu, hardswish and
            gelu; None for none. Ignored by the fallback, which recomputes.
        x: as in the forward, like all that follow.
        weight: see :func:`masked_conv2d`.
        bias: see :func:`masked_conv2d`.
        gate: see :func:`masked_conv2d`.
        live_in: see :func:`masked_conv2d`.
        live_out: see :func:`masked_conv2d`.
        stride: see :func:`masked_conv2d`.
        padding: see :func:`masked_conv2d`.
        dilation: see :func:`masked_conv2d`.
        groups: see :func:`masked_conv2d`.
        activation: see :func:`masked_conv2d`.
        exact: see :func:`masked_conv2d`.

    Returns:
        Gradients of x, weight, bias and gate; None where bias or gate is None.

    Raises:
        RuntimeError: a shape or dtype does not fit, or ``saved`` is missing.
    """
    settings = (pair(stride), pair(padding), pair(dilation), groups, activation)
    has_bias, has_gate = bias is not None, gate is not None
    if can_run_masked_conv2d(x, weight).ok:
        grads = torch.ops.lightning_prune.masked_conv2d_backward(
            grad_y,
            saved,
            x,
            weight,
            bias,
            gate,
            live_in,
            live_out,
            *settings,
            True,
            True,
            has_bias,
            has_gate,
            _algorithm(exact),
        )
        return grads[0], grads[1], grads[2] if has_bias else None, grads[3] if has_gate else None
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, gate) if t is not None]
    rest = iter(leaves[2:])
    with torch.enable_grad():
        y = reference.masked_conv2d(
            leaves[0],
            leaves[1],
            next(rest) if has_bias else None,
            next(rest) if has_gate else None,
            live_in,
            live_out,
            *settings,
        )
    found = iter(torch.autograd.grad(y, leaves, grad_y))
    return next(found), next(found), next(found) if has_bias else None, next(found) if has_gate else None
