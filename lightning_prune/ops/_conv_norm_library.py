"""Fake kernels of ``masked_conv_norm_act``. It moves running statistics: ``conv_norms.ConvNorm`` is its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.ops import _norm_library

NAME = "lightning_prune::masked_conv_norm_act"


def _geometry(numbers: list[int]) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups."""
    return numbers[:2], numbers[2:4], numbers[4:6], numbers[6]


def register(conv: Callable[..., Tensor], conv_backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Register what belongs to the operator beside its kernels, given the fake kernels of the convolution."""

    def fake(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_gate: Tensor | None,
        live_in: Tensor | None,
        live_out: Tensor | None,
        compact_maps: bool,
        geometry: list[int],
        residual: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        live: Tensor | None,
        compact_of: int,
        eps: float,
        activation: str,
        *statistics: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lists = live_in, live_out
        middle = conv(
            x, weight, bias, None, *lists, *_geometry(geometry), "none", "auto", in_gate, compact_maps
        )
        norm = residual, norm_weight, norm_bias, None, None, None, live, eps, activation, compact_of
        y, mean, var = _norm_library.fake(middle, *norm)
        return y, middle, mean, var

    def backward_fake(
        grad_y: Tensor,
        middle: Tensor,
        mean: Tensor,
        var: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_gate: Tensor | None,
        live_in: Tensor | None,
        live_out: Tensor | None,
        compact_maps: bool,
        geometry: list[int],
        residual: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        live: Tensor | None,
        compact_of: int,
        eps: float,
        activation: str,
        needs: int,
    ) -> tuple[Tensor, ...]:
        x_, weight_, bias_, gate_, scale_, shift_, residual_ = (bool(needs >> bit & 1) for bit in range(7))
        grad_x, grad_weight, grad_bias, _, grad_gate = conv_backward(
            middle, None, x, weight, bias, None, live_in, live_out, *_geometry(geometry), "none",
            x_, weight_, bias_, False, "auto", in_gate, gate_, compact_maps,
        )  # fmt: skip
        _, grad_residual, grad_scale, grad_shift, _ = _norm_library.backward_fake(
            grad_y, middle, residual, norm_weight, norm_bias, None, mean, var, live, True, eps, activation,
            True, residual_, scale_, shift_, False, compact_of,
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad_gate, grad_scale, grad_shift, grad_residual

    torch.library.register_fake(NAME, fake)
    torch.library.register_fake(f"{NAME}_backward", backward_fake)
