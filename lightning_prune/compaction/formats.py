"""Memory formats by strides: where sizes are 1, a tensor is contiguous in several formats at once.

Vendor libraries choose kernels by the strides, so the smaller tensor must have those that a fresh one of that format has: a
3x3 weight over one input channel whose strides say NCHW takes the whole convolution out of channels_last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """By its strides: where sizes are 1, several formats are contiguous at once."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim())
    if (
        wanted is not None
        and torch.empty(tensor.shape, device="meta", memory_format=wanted).stride() == tensor.stride()
    ):
        return wanted
    return torch.contiguous_format


def laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy of ``tensor`` with the strides that a fresh tensor of ``memory_format`` has."""
    result = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)
    return result.copy_(tensor)
