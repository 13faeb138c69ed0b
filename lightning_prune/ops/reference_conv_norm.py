"""Pure-torch definition of ``masked_conv_norm_act``: the yardstick of the compiled operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.ops import reference, reference_norm
from lightning_prune.ops.batch_norm import update_running


def _picked(vector: Tensor | None, index: Tensor | None) -> Tensor | None:
    return vector if vector is None or index is None else vector.index_select(0, index)


def masked_conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_gate: Tensor | None,
    live_in: Tensor | None,
    live_out: Tensor | None,
    compact_maps: bool,
    geometry: Sequence[int],
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    live: Tensor | None,
    compact_of: int,
    eps: float,
    activation: str,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    tracked: Tensor | None = None,
    momentum: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convolution, batch norm of the batch's moments (Ioffe and Szegedy 2015), residual sum and activation.

    Args:
        x: shape (N, C, H, W), float32 or float64; with ``compact_maps`` the channels ``live_in`` alone.
        weight: shape (O, C / groups, kh, kw) of all channels, like bias (O,), in_gate (C,), norm_weight and norm_bias.
        bias: or None.
        in_gate: multiplies the inputs, or None.
        live_in: sorted int64 inputs that are read, None for all.
        live_out: likewise outputs; the others are zero, and are not there with ``compact_maps``.
        compact_maps: maps hold live channels only; not with groups.
        geometry: stride, padding and dilation, two numbers each, and groups.
        residual: added before the activation, shape of y, or None.
        norm_weight: or None.
        norm_bias: or None.
        live: channels that the norm's map holds, of ``compact_of``; None and 0 for all.
        compact_of: length of the norm's vectors.
        eps: added to the variance.
        activation: see ``reference.ACTIVATIONS``.
        running_mean: moved in place by ``momentum`` towards the batch's, or None; likewise ``running_var``, and ``tracked``,
            int64, counts the batch.
        running_var: as in ``nn.BatchNorm2d``.
        tracked: or None.
        momentum: share of the batch.

    Returns:
        y and the convolution's output, shape (N, O, H', W'); mean and biased variance of the latter, shape (compact_of or O,).
        Differentiable to any order by torch itself.
    """
    stride, padding, dilation, groups = geometry[:2], geometry[2:4], geometry[4:6], geometry[6]
    if compact_maps:
        weight = weight if live_in is None else weight.index_select(1, live_in)
        weight = weight if live_out is None else weight.index_select(0, live_out)
        bias, in_gate = _picked(bias, live_out), _picked(in_gate, live_in)
        live_in = live_out = None
    if in_gate is not None:
        x = x * in_gate[:, None, None]
    middle = reference.masked_conv2d(
        x, weight, bias, None, live_in, live_out, stride, padding, dilation, groups
    )
    y, mean, var = reference_norm.masked_batch_norm_act(
        middle, residual, norm_weight, norm_bias, None, None, None, live, eps, activation, compact_of
    )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            count = middle.numel() // middle.shape[1]
            update_running(running_mean, running_var, mean, var, count, momentum)
            if tracked is not None:
                tracked.add_(1)
    return y, middle, mean, var
