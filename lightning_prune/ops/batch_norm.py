"""`masked_batch_norm_act`: batch normalisation, gate, residual sum and activation in two passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.ops import reference_norm
from lightning_prune.ops.availability import can_run_masked_batch_norm_act


def masked_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    live: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Batch normalisation (Ioffe and Szegedy 2015) with gate, residual sum and activation in one operator.

    ``y[:, c] = act(gate[c] * (weight[c] * (x[:, c] - mean[c]) / sqrt(var[c] + eps) + bias[c]) + residual[:, c])`` for ``c``
    in ``live`` and ``act(residual[:, c])`` for the others, whose values in x are not used (they may be NaN) and whose
    gradients are exactly zero. Statistics are those of the batch in training or without running ones.

    Args:
        x: input, shape (N, C, H, W), float32 or float64, on CUDA also float16 and bfloat16. channels_last in,
            channels_last out. Vectors have its dtype, or float32 for half types; sums are at least float32.
        running_mean: shape (C,) or None; in training moved towards the batch's mean, in place.
        running_var: shape (C,) or None; likewise, towards the unbiased variance. Dead channels count as constant zero.
        weight: shape (C,) or None.
        bias: shape (C,) or None.
        gate: multiplier per channel, shape (C,), or None.
        residual: added before the activation, shape of x, or None.
        live: sorted unique int64 channels, or None for all.
        training: use and record the statistics of the batch.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        activation: none, relu, relu6, silu, hardswish, gelu or sigmoid.

    Returns:
        Tensor of shape (N, C, H, W).

    Raises:
        RuntimeError: a shape, dtype, device or index does not fit (ValueError or RuntimeError in the fallback).
        ValueError: one of the running statistics without the other.

    Accuracy in float32 against float64: values in units of the activation's input scale to 1e-5 as long as the mean of a
    channel is at most a thousand standard deviations; the variance is summed about the channel's first value (CUDA: the first
    in each block's part, parts added in float64). On the CPU the gradient of x is within 1e-5, for means of up to ten standard
    deviations s (1e-4: a thousand), of ``|weight * gate| / s`` times the largest ``|grad_y|``; that of weight, bias and gate
    within 1e-6 (2e-5) of the sum of ``|grad_y| * (1 + |x - mean| / s)`` times what multiplies them. Results are the same bits
    every time on the same device. Second derivatives are not implemented. Under autocast on the CPU it runs in float32; on
    CUDA it takes what it is given.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("give both running_mean and running_var, or neither")
    of_batch = training or running_mean is None
    statistics = (None, None) if of_batch else (running_mean, running_var)
    arguments = (x, residual, weight, bias, gate, *statistics, live, eps, activation)
    if can_run_masked_batch_norm_act(x).ok:
        y, mean, var = torch.ops.lightning_prune.masked_batch_norm_act(*arguments)
    else:
        y, mean, var = reference_norm.masked_batch_norm_act(*arguments)
    if training and running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean, var, x.numel() // max(x.shape[1], 1), momentum)
    result: Tensor = y
    return result


@torch.no_grad()
def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Move running statistics, in place, as ``nn.BatchNorm2d`` does: towards the mean and the unbiased variance.

    Args:
        running_mean: shape (C,).
        running_var: shape (C,).
        mean: of the batch, shape (C,).
        var: of the batch, biased, shape (C,).
        count: values per channel.
        momentum: share of the batch.
    """
    unbiased = var * (count / max(count - 1, 1))
    running, of_batch = (
        [running_mean, running_var],
        [mean.to(running_mean.dtype), unbiased.to(running_var.dtype)],
    )
    torch._foreach_lerp_(running, of_batch, momentum)  # on a GPU one launch for both
