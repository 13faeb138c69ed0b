"""Fake kernels of ``masked_conv_norm_act``. It moves running statistics: ``conv_norms.ConvNorm`` is its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.ops import _norm_library

NAME = "lightning_prune::masked_conv_norm_act"


class _Arguments(NamedTuple):
    """What the operator and its backward both take, in this order; see ``reference_conv_norm``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    in_gate: Tensor | None
    live_in: Tensor | None
    live_out: Tensor | None
    compact_maps: bool
    geometry: list[int]
    residual: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    live: Tensor | None
    compact_of: int
    eps: float
    activation: str

    def conv(self) -> tuple[Any, ...]:
        """The convolution's, up to its activation."""
        g = self.geometry
        tensors = self.x, self.weight, self.bias, None, self.live_in, self.live_out
        return (*tensors, g[:2], g[2:4], g[4:6], g[6], "none")


def register(conv: Callable[..., Tensor], conv_backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Register what belongs to the operator beside its kernels, given the fake kernels of the convolution."""

    def fake(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a = _Arguments(*given[: len(_Arguments._fields)])
        middle = conv(*a.conv(), "auto", a.in_gate, a.compact_maps)
        vectors = a.norm_weight, a.norm_bias, None, None, None
        y, mean, var = _norm_library.fake(
            middle, a.residual, *vectors, a.live, a.eps, a.activation, a.compact_of
        )
        return y, middle, mean, var

    def backward_fake(
        grad_y: Tensor, middle: Tensor, mean: Tensor, var: Tensor, *given: Any
    ) -> tuple[Tensor, ...]:
        a, needs = _Arguments(*given[:-1]), given[-1]
        x_, weight_, bias_, gate_, scale_, shift_, residual_ = (bool(needs >> bit & 1) for bit in range(7))
        grad_x, grad_weight, grad_bias, _, grad_gate = conv_backward(
            middle, None, *a.conv(), x_, weight_, bias_, False, "auto", a.in_gate, gate_, a.compact_maps
        )
        _, grad_residual, grad_scale, grad_shift, _ = _norm_library.backward_fake(
            grad_y, middle, a.residual, a.norm_weight, a.norm_bias, None, mean, var, a.live, True, a.eps, a.activation,
            True, residual_, scale_, shift_, False, a.compact_of,
        )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad_gate, grad_scale, grad_shift, grad_residual

    torch.library.register_fake(NAME, fake)
    torch.library.register_fake(f"{NAME}_backward", backward_fake)
