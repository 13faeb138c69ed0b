"""Pure-torch definitions of the operators: the yardstick of the compiled kernels and the fallback without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.ops.tensor_cores import carried_lanes, tensor_lanes, tensor_weight
from lightning_prune.ops.winograd import TRANSFORMED, transform_tile, transform_weight, transformed_shape

_PANEL = 16
#: dtypes of maps and weights
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOAT_NAMES = "float32, float64, bfloat16 or float16"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The torch function of an activation name.

    Raises:
        ValueError: the name is not in ``ACTIVATIONS``.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]


def check_index(
    name: str, index: Tensor | None, limit: int, *, is_sorted: bool = False, unique: bool = False
) -> None:
    """Raise ValueError unless ``index`` is None or a 1-D int64 tensor of channels below ``limit``."""
    if index is None:
        return
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"{name} must be a 1-D int64 tensor of channel indices; got shape {tuple(index.shape)} and {index.dtype}"
        )
    if index.numel() == 0:
        return
    if int(index.min()) < 0 or int(index.max()) >= limit:
        raise ValueError(f"{name} must hold channels in [0, {limit}); got {index.tolist()}")
    if is_sorted and bool((index[1:] <= index[:-1]).any()):
        raise ValueError(f"{name} must be sorted and unique (use torch.unique(index)); got {index.tolist()}")
    if unique and index.unique().numel() != index.numel():
        raise ValueError(f"{name} must be unique; got {index.tolist()}")


def check_input(x: Tensor) -> None:
    """Raise ValueError unless ``x`` is what :func:`compact_conv2d` computes with: other numbers would be rounded away."""
    if x.dim() != 4:
        raise ValueError(
            f"x must be 4-D (N, C, H, W); got shape {tuple(x.shape)}; add the missing dimension: x.unsqueeze(0) for one "
            "image (C, H, W), x.unsqueeze(2) for lines (N, C, L)"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be {_FLOAT_NAMES}; got {x.dtype}; convert it first: x.float()")


def check_residual(residual: Tensor, outputs: Sequence[int], width: int | None = None) -> None:
    """Raise ValueError unless ``residual`` can be added to maps of shape ``outputs`` without broadcasting.

    Args:
        residual: what is added.
        outputs: shape of the convolution's result.
        width: channels of the residual, where they are not those of the result.
    """
    expected = (outputs[0], outputs[1] if width is None else width, *outputs[2:])
    if tuple(residual.shape) != expected:
        raise ValueError(
            f"residual must have shape {expected}; got {tuple(residual.shape)}; expand it first: residual.expand{expected}"
        )


def _alive(index: Tensor, channels: int) -> Tensor:
    mask = torch.zeros(channels, dtype=torch.bool, device=index.device)
    mask[index] = True
    return mask[None, :, None, None]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    live_in: Tensor | None = None,
    live_out: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Reference of :func:`lightning_prune.ops.masked_conv2d`; differentiable to any order by torch itself."""
    function = activation_function(activation)
    check_index("live_in", live_in, x.shape[1], is_sorted=True)
    check_index("live_out", live_out, weight.shape[0], is_sorted=True)
    zero = x.new_zeros(())
    if live_in is not None:
        x = torch.where(_alive(live_in, x.shape[1]), x, zero)
    y = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    if gate is not None:
        y = y * gate[:, None, None]
    y = function(y)
    if live_out is not None:
        y = torch.where(_alive(live_out, y.shape[1]), y, y.new_zeros(()))
    return y


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype weights are packed and sums are accumulated in: float32 for the half types."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _packed_width(outputs: int) -> int:
    rest = outputs % _PANEL
    return outputs - rest + (0 if rest == 0 else 8 if rest <= 8 else _PANEL)


def _is_depthwise(weight_shape: Sequence[int], groups: int) -> bool:
    return weight_shape[1] == 1 and groups > 1


def packed_size(weight_shape: Sequence[int], groups: int, tile: int = 0) -> int:
    """Number of elements of the packed form of a weight; csrc/include/lp_params.h describes the layout.

    Args:
        weight_shape: (O, C / groups, kh, kw).
        groups: of the convolution.
        tile: code of the Winograd tile whose transformed weights it carries, see ``ops/winograd.py``; 0 without.
    """
    outputs, channels, height, width = weight_shape
    if _is_depthwise(weight_shape, groups):
        return outputs * height * width
    size = groups * _packed_width(outputs // groups) * channels * height * width
    return size if tile == 0 else size + packed_size(transformed_shape(weight_shape, tile), 1)


@lru_cache(maxsize=64)
def _packed_positions(weight_shape: tuple[int, int, int, int], groups: int) -> Tensor:
    """Where each weight element lies in the packed tensor; shape of the weight, int64."""
    outputs, channels, height, width = weight_shape
    o = torch.arange(outputs).view(-1, 1, 1)
    c = torch.arange(channels).view(1, -1, 1)
    tap = torch.arange(height * width).view(1, 1, -1)
    if _is_depthwise(weight_shape, groups):
        return (tap * outputs + o + c * 0).reshape(weight_shape)
    per_group = outputs // groups
    total, depth = _packed_width(per_group), channels * height * width
    group, local = o // per_group, o % per_group
    panel = local // _PANEL
    lanes = torch.where(total - panel * _PANEL < _PANEL, 8, _PANEL)
    position = group * total * depth + panel * _PANEL * depth + (tap * channels + c) * lanes + local % _PANEL
    return position.reshape(weight_shape)


def check_packable(weight_shape: Sequence[int], groups: int) -> None:
    """Raise ValueError unless ``weight_shape`` is 4-D and ``groups`` divides its outputs."""
    if len(weight_shape) != 4:
        raise ValueError(f"weight must be 4-D (O, C / groups, kh, kw); got shape {tuple(weight_shape)}")
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(f"groups must divide the {weight_shape[0]} output channels; got groups={groups}")


def pack_conv2d_weight(weight: Tensor, groups: int = 1, algorithm: str = "direct") -> Tensor:
    """Reference of :func:`lightning_prune.ops.pack_conv2d_weight`."""
    check_packable(weight.shape, groups)
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"weight must be {_FLOAT_NAMES}; got {weight.dtype}; convert it first: weight.float()"
        )
    tile = transform_tile(weight, groups, algorithm)
    shape = (weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3])
    packed = weight.new_zeros(packed_size(shape, groups), dtype=compute_dtype(weight.dtype))
    packed[_packed_positions(shape, groups).to(weight.device)] = weight.to(packed.dtype)
    lanes = tensor_lanes(weight, groups, algorithm)
    if lanes:
        return torch.cat([packed, tensor_weight(weight.to(packed.dtype), groups, lanes)])
    return (
        packed
        if tile == 0
        else torch.cat([packed, pack_conv2d_weight(transform_weight(weight.to(packed.dtype), tile))])
    )


def unpack_conv2d_weight(packed: Tensor, weight_shape: Sequence[int], groups: int = 1) -> Tensor:
    """The weight that was packed, for whatever algorithm; shape ``weight_shape``, dtype of ``packed``.

    Raises:
        ValueError: ``packed`` is not the packed form of a weight of this shape.
    """
    check_packable(weight_shape, groups)
    shape = (int(weight_shape[0]), int(weight_shape[1]), int(weight_shape[2]), int(weight_shape[3]))
    expected = packed_size(shape, groups)
    tiles = {0}
    if groups == 1 and shape[2] == shape[3]:
        tiles |= {tile for tile, kernels in TRANSFORMED.values() if shape[2] in kernels}
    sizes = {packed_size(shape, groups, tile) for tile in tiles}
    known = packed.dim() == 1 and (
        packed.shape[0] in sizes or carried_lanes(packed.shape[0], expected, shape, groups) > 0
    )
    if not known:
        raise ValueError(
            f"packed must have shape ({expected},) for weight_shape {shape}; got {tuple(packed.shape)}"
        )
    return packed[_packed_positions(shape, groups).to(packed.device)]


def compact_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Reference of :func:`lightning_prune.ops.compact_conv2d`."""
    function = activation_function(activation)
    check_input(x)
    check_index("in_index", in_index, x.shape[1])
    dtype = compute_dtype(x.dtype)
    weight = unpack_conv2d_weight(packed, weight_shape, groups).to(dtype)
    inputs = (x if in_index is None else x[:, in_index]).to(dtype)
    y = F.conv2d(
        inputs,
        weight,
        None if bias is None else bias.to(dtype),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )
    if out_index is not None:
        if residual is None:
            raise ValueError(
                "out_index adds the outputs to channels of residual, so residual must not be None"
            )
        check_residual(residual, y.shape, residual.shape[1] if residual.dim() == 4 else None)
        check_index("out_index", out_index, residual.shape[1], unique=True)
        y = residual.to(dtype).index_add(1, out_index, y)
    elif residual is not None:
        check_residual(residual, y.shape)
        y = y + residual.to(dtype)
    return function(y).to(x.dtype)
