"""Statistics over channels of which some are gone: those still count, as the zeros they are in the masked network.

A layer norm over 96 channels of which 30 are zero divides by 96. Its compact twin sees 66 channels, and gets the same
numbers by dividing by 96 too and by adding what 30 zeros add to the variance. Everything here is plain torch: it
trains, exports and compiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _statistics(x: Tensor, dims: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance along ``dims`` of ``x`` padded with zeros to ``count`` elements."""
    here = 1
    for d in dims:
        here = here * x.shape[d]
    mean = x.sum(dims, keepdim=True) / count
    variance = ((x - mean).square().sum(dims, keepdim=True) + (count - here) * mean.square()) / count
    return mean, variance


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


#: under a name that no module's list of sized calls counts: these helpers are not part of the traced code
_reshape = torch.ops.aten.reshape.default


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    count: int,
) -> Tensor:
    """Layer norm over the last ``len(normalized_shape)`` dimensions, as if they held ``count`` elements."""
    dims = list(range(-len(normalized_shape), 0))
    y = _precise(x)
    mean, variance = _statistics(y, dims, count)
    y = ((y - mean) * torch.rsqrt(variance + eps)).to(x.dtype)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).contiguous()


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    count: int,
) -> Tensor:
    """Root-mean-square norm over the last dimensions, as if they held ``count`` elements."""
    y = _precise(x)
    square = y.square().sum(list(range(-len(normalized_shape), 0)), keepdim=True) / count
    y = (y * torch.rsqrt(square + (torch.finfo(y.dtype).eps if eps is None else eps))).to(x.dtype)
    return (y if weight is None else y * weight).contiguous()


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    count: int,
) -> Tensor:
    """Group norm of ``[N, C, ...]`` as if there were ``count`` channels."""
    y = _reshape(_precise(x), [x.shape[0], num_groups, x.shape[1] // num_groups, -1])
    mean, variance = _statistics(y, [2, 3], count // num_groups * y.shape[3])
    y = _reshape(((y - mean) * torch.rsqrt(variance + eps)).to(x.dtype), list(x.shape))
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * _reshape(weight, shape)
    return y if bias is None else y + _reshape(bias, shape)


def mean(x: Tensor, dim: int | list[int], keepdim: bool = False, *, counts: dict[int, int]) -> Tensor:
    """Mean along ``dim`` as if dimension ``d`` held ``counts[d]`` elements."""
    result = x.sum(dim, keepdim)
    for d in [dim] if isinstance(dim, int) else dim:
        result = result / counts.get(d % x.dim(), x.shape[d])
    return result
