"""Fake kernels, autograd and autocast of the compiled operators; registered once, when the library has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.ops import _conv_norm_library, _loading, _norm_library

NAMESPACE = "lightning_prune"
# Activations whose derivative is a function of their output; the others need the value before the activation.
DERIVATIVE_FROM_OUTPUT = frozenset({"relu", "relu6", "sigmoid"})


def output_format(x: Tensor) -> torch.memory_format:
    """channels_last for inputs that are channels_last and not plain contiguous; the C++ rule is the same."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def new_output(x: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """An uninitialised tensor of ``shape`` with x's dtype and device, in x's memory format."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=output_format(x))


def output_size(size: Any, kernel: Any, stride: int, padding: int, dilation: int) -> Any:
    """Output extent of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Any, ...]:
    """Shape of a convolution's result, (N, O, H', W')."""
    settings = zip(x.shape[2:], weight_shape[2:], stride, padding, dilation, strict=True)
    return (x.shape[0], weight_shape[0], *(output_size(*numbers) for numbers in settings))


def _masked_conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    live_in: Tensor | None,
    live_out: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    algorithm: str = "auto",
    in_gate: Tensor | None = None,
    compact_maps: bool = False,
) -> Tensor:
    images, outputs, *size = output_shape(x, weight.shape, stride, padding, dilation)
    if compact_maps and live_out is not None:
        outputs = live_out.shape[0]
    return new_output(x, (images, outputs, *size))


def _masked_conv2d_backward_fake(
    grad_y: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    live_in: Tensor | None,
    live_out: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_gate: bool,
    algorithm: str = "auto",
    in_gate: Tensor | None = None,
    need_in_gate: bool = False,
    compact_maps: bool = False,
) -> tuple[Tensor, ...]:
    outputs = weight.shape[0]
    return (
        new_output(x, tuple(x.shape) if need_x else (0, 0, 0, 0)),
        new_output(
            weight if x.device.type == "cpu" else weight.contiguous(),
            tuple(weight.shape) if need_weight else (0, 0, 0, 0),
        ),
        x.new_empty((outputs if need_bias else 0,)),
        x.new_empty((outputs if need_gate else 0,)),
        x.new_empty((weight.shape[1] * groups if need_in_gate else 0,)),
    )


def _pack_fake(weight: Tensor, groups: int, algorithm: str = "direct") -> Tensor:
    from lightning_prune.ops.reference import compute_dtype, packed_size
    from lightning_prune.ops.tensor_cores import tensor_lanes, tensor_weight_size
    from lightning_prune.ops.winograd import transform_tile

    shape = tuple(weight.shape)
    size = packed_size(shape, groups, transform_tile(weight, groups, algorithm))
    size += tensor_weight_size(shape, groups, tensor_lanes(weight, groups, algorithm))
    return weight.new_empty((size,), dtype=compute_dtype(weight.dtype))


def _compact_conv2d_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    images, channels, *size = output_shape(x, weight_shape, stride, padding, dilation)
    if residual is not None and out_index is not None:
        channels = residual.shape[1]
    shape = (images, channels, *size)
    if x.is_cuda:
        from lightning_prune.ops.reference import packed_size
        from lightning_prune.ops.tensor_cores import carried_lanes, padded_output, rows_of_channels

        lanes = carried_lanes(packed.shape[0], packed_size(weight_shape, groups), weight_shape, groups)
        if lanes == {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}.get(x.dtype) and rows_of_channels(
            x
        ):
            return padded_output(x, shape)
    return new_output(x, shape)


def _prepared_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    settings: list[int],
) -> Tensor:
    shapes = (settings[:4], settings[4:6], settings[6:8], settings[8:10], settings[10], "")
    return _compact_conv2d_fake(x, packed, bias, residual, in_index, out_index, *shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, gate, live_in, live_out, *settings, in_gate, ctx.compact_maps = inputs
    ctx.settings = settings
    saved = output if settings[-2] in DERIVATIVE_FROM_OUTPUT else None
    ctx.save_for_backward(x, weight, bias, gate, live_in, live_out, saved, in_gate)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, weight, bias, gate, live_in, live_out, saved, in_gate = ctx.saved_tensors
    *settings, activation, algorithm = ctx.settings
    op = torch.ops.lightning_prune
    if activation != "none" and saved is None:
        # Recomputing the value before the activation is cheaper in memory than keeping a second activation map.
        saved = op.masked_conv2d(
            x, weight, bias, gate, live_in, live_out, *settings, "none", algorithm, in_gate, ctx.compact_maps
        )
    # Arguments left at their defaults are not among the inputs.
    needs = [*ctx.needs_input_grad[:4], any(ctx.needs_input_grad[12:])]
    arguments = (grad_y, saved, x, weight, bias, gate, live_in, live_out, *settings, activation)
    grads = op.masked_conv2d_backward(*arguments, *needs[:4], algorithm, in_gate, needs[4], ctx.compact_maps)
    *found, in_gate_grad = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*found, *([None] * 8), in_gate_grad, None)


def _no_second_order(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(
        "masked_conv2d has no second derivative; lightning_prune.ops.reference.masked_conv2d has one"
    )


def _live_block_fake(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    sizes = [n if i is None else len(i) for n, i in zip(weight.shape, (rows, columns), strict=False)]
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    block = weight.new_empty(*sizes, *weight.shape[2:])
    return block.contiguous(memory_format=torch.channels_last) if last else block


def _register() -> None:
    library = torch.library
    library.register_fake(f"{NAMESPACE}::masked_conv2d", _masked_conv2d_fake)
    library.register_fake(f"{NAMESPACE}::masked_conv2d_backward", _masked_conv2d_backward_fake)
    library.register_fake(f"{NAMESPACE}::pack_conv2d_weight", _pack_fake)
    library.register_fake(f"{NAMESPACE}::compact_conv2d", _compact_conv2d_fake)
    library.register_fake(f"{NAMESPACE}::compact_conv2d_prepared", _prepared_fake)
    library.register_fake(f"{NAMESPACE}::keep_bits", lambda tensors, keep: None)
    library.register_fake(f"{NAMESPACE}::live_block", _live_block_fake)
    for name in ("spread_block", "gather_blocks", "spread_blocks"):
        library.register_fake(f"{NAMESPACE}::{name}", lambda *arguments: None)
    library.register_autograd(f"{NAMESPACE}::masked_conv2d", _backward, setup_context=_setup_context)
    library.register_autograd(f"{NAMESPACE}::masked_conv2d_backward", _no_second_order)
    for device in ("cpu", "cuda"):
        library.register_autocast(f"{NAMESPACE}::masked_conv2d", device, torch.float32)
    _norm_library.register()
    _conv_norm_library.register(_masked_conv2d_fake, _masked_conv2d_backward_fake)


LOADED = _loading.load() is None
if LOADED:
    _register()
