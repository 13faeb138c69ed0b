"""Weights for the tensor-core convolution on CUDA: which packed weights carry them, and the reference of their layout.

Like Winograd weights they lie behind the direct layout, see :mod:`lightning_prune.ops.winograd`. Input channels come in
chunks of ``lanes`` (16 bytes: 8 of a half type, 4 of float32 for tf32), in the order (tap, chunk, output, lane); channels and
outputs are padded with zeros to multiples of 8. Depthwise weights, which use no tensor cores, are (tap, output) and begin at
a multiple of 8 elements. One (8 lanes) or two (4 lanes) zeros more tell the size from a Winograd weight's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ALGORITHM = "tensor_core"
_MARK = {8: 1, 4: 2}


def tf32_allowed() -> bool:
    """Whether torch's own convolutions may round float32 to tf32 on a GPU."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # the newer setting is in use, and differs between operators
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def _padded(channels: int) -> int:
    return -(-channels // 8) * 8


def _depthwise(weight_shape: Sequence[int], groups: int) -> bool:
    return groups > 1 and weight_shape[0] == groups and weight_shape[1] == 1


def tensor_lanes(weight: Tensor, groups: int, algorithm: str) -> int:
    """Lanes of the weights that ``algorithm`` asks for behind the direct layout; 0 for none.

    "auto" asks for them wherever they change no rounding: half types and depthwise weights. Other float32 weights have them
    only with "tensor_core", since tf32 rounds to 10 bits.

    Raises:
        ValueError: "tensor_core" for a weight that it does not take.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    depthwise = _depthwise(weight.shape, groups)
    fits = weight.is_cuda and (groups == 1 or depthwise) and (half or weight.dtype == torch.float32)
    if algorithm == ALGORITHM and not fits:
        raise ValueError(
            f"algorithm {algorithm!r} takes float32, bfloat16 or float16 weights on CUDA, dense or depthwise; got "
            f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device.type} with groups={groups}"
        )
    if algorithm == ALGORITHM or (algorithm == "auto" and fits and (half or depthwise)):
        return 8 if half else 4
    return 0


def _gap(weight_shape: Sequence[int], groups: int) -> int:
    """Zeros behind the direct layout, so that what follows begins at 16 bytes."""
    outputs, _, height, width = weight_shape
    return -(outputs * height * width) % 8 if _depthwise(weight_shape, groups) else 0


def tensor_weight_size(weight_shape: Sequence[int], groups: int, lanes: int) -> int:
    """Elements behind the direct layout; 0 for 0 lanes."""
    if lanes == 0:
        return 0
    outputs, channels, height, width = weight_shape
    rows = 1 if _depthwise(weight_shape, groups) else _padded(channels)
    return _gap(weight_shape, groups) + height * width * rows * _padded(outputs) + _MARK[lanes]


def carried_lanes(size: int, direct: int, weight_shape: Sequence[int], groups: int) -> int:
    """Lanes of the weights behind the direct layout in a packed weight of ``size`` elements, ``direct`` of them direct."""
    if groups != 1 and not _depthwise(weight_shape, groups):
        return 0
    return next((n for n in (8, 4) if size == direct + tensor_weight_size(weight_shape, groups, n)), 0)


def tensor_weight(weight: Tensor, groups: int, lanes: int) -> Tensor:
    """What lies behind the direct layout; 1-D, of the weight's dtype."""
    outputs, channels, height, width = weight.shape
    rows = 1 if _depthwise(weight.shape, groups) else _padded(channels)
    padded = weight.new_zeros(_padded(outputs), rows, height * width)
    padded[:outputs, :channels] = weight.flatten(2)
    chunks = padded.view(_padded(outputs), -1, min(lanes, rows), height * width).permute(3, 1, 0, 2)
    gap = weight.new_zeros(_gap(weight.shape, groups))
    return torch.cat([gap, chunks.reshape(-1), weight.new_zeros(_MARK[lanes])])


def rows_of_channels(x: Tensor) -> bool:
    """Whether the channels of each pixel lie together and the pixels follow each other at one distance.

    True for channels_last and for channels_last with spare room behind the channels of each pixel, not for what is also
    contiguous. The C++ rule is the same.
    """
    if x.dim() != 4 or x.is_contiguous() or (x.shape[1] > 1 and x.stride(1) != 1):
        return False
    n, _, h, w = x.shape
    pitch = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0)
    if pitch < x.shape[1]:
        return False
    return (h == 1 or x.stride(2) == w * pitch) and (n == 1 or x.stride(0) == h * w * pitch)


def padded_output(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """An uninitialised channels_last tensor of ``shape`` with room for a multiple of 8 channels behind each pixel."""
    n, c, h, w = shape
    room = torch.empty(
        (n, -(-c // 8) * 8, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    return room[:, :c] if c % 8 else room


def with_room(x: Tensor) -> Tensor:
    """A copy of ``x`` in the layout of :func:`padded_output`, with zeros behind the channels."""
    wide = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % 8)).contiguous(memory_format=torch.channels_last)
    return wide[:, : x.shape[1]]


def room_of(x: Tensor) -> Tensor:
    """``x`` with its channels filled up to a multiple of 8 by finite values, which a weight of zero makes zeros.

    Without a copy where pixels are apart by just the next multiple of 8: what our kernels and ``PaddedConv2d`` put out has
    that room. In a slice of a wider map these are its next channels.
    """
    n, c, h, w = x.shape
    wide = -(-c // 8) * 8
    if wide == c:
        return x
    if (
        rows_of_channels(x)
        and w > 1
        and x.stride(3) == wide
        and not (torch.is_grad_enabled() and x.requires_grad)
    ):
        end = x.storage_offset() + n * h * w * wide
        if end * x.element_size() <= x.untyped_storage().nbytes():
            return x.as_strided((n, wide, h, w), (h * w * wide, 1, w * wide, wide))
    return F.pad(x, (0, 0, 0, 0, 0, wide - c))
