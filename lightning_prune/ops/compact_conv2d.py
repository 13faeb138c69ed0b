"""`compact_conv2d` and its weight packing: inference at any channel count, with a fused epilogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.ops import reference
from lightning_prune.ops.availability import can_run_compact_conv2d
from lightning_prune.ops.masked_conv2d import pair
from lightning_prune.ops.reference import ACTIVATIONS, unpack_conv2d_weight

__all__ = ["compact_conv2d", "pack_conv2d_weight", "prepared_settings", "unpack_conv2d_weight"]
_PLACES = {name: place for place, name in enumerate(ACTIVATIONS)}


def pack_conv2d_weight(weight: Tensor, groups: int = 1, algorithm: str = "direct") -> Tensor:
    """Rearrange a convolution weight for :func:`compact_conv2d`.

    Args:
        weight: shape (O, C / groups, kh, kw); float32, float64, bfloat16 or float16.
        groups: of the convolution.
        algorithm: ``direct`` sums the products in the order of the definition. ``winograd2`` and ``winograd4`` add the
            weight transformed for Winograd convolution with output tiles of 2x2 and 4x4 (float32 and half types, 3x3 and,
            with 2x2 tiles, 5x5, groups=1, CPU; 2.8 and 5 times the memory for 3x3, 2.4 times for 5x5); it is used for
            stride 1 and does a half and a quarter of the multiplications of 3x3, a third of those of 5x5.
            ``winograd4_stride2`` (3x3, 5x5), ``winograd5_stride2`` (3x3) and ``winograd3_stride2`` (7x7) are used for stride 2
            without dilation, with output tiles of that side: even and odd inputs are a stride-1 convolution each, transformed
            at the same points. They do 56 %, 54 %, and for 5x5 and 7x7 30 % and 27 % of the multiplications (7x7 of up to
            four channels: 33 %, on blocks of 2x2 pixels), in 10, 14.4, 5.8 and 3.5 times the memory.
            ``strassen`` (float32, 1x1, groups=1, CPU) adds the sums of one level of Strassen's algorithm (1969) in Winograd's
            form: for every 64 outputs (what is left over, up to 56, is summed directly) 7/8 of the multiplications, in 2.75
            times the memory; it is used for stride 1 on channels_last maps of 48 pixels and more (with fewer than 96 inputs:
            up to 16 MB of results).
            ``tensor_core`` (CUDA, dense or depthwise) adds the weight in the layout of the tensor-core
            kernels, for inputs of the weight's dtype; float32 is multiplied as tf32 there, except in depthwise
            convolutions. ``auto``, from 9 inputs and outputs up, takes ``winograd4`` for 3x3, ``winograd2`` for 5x5 and
            for 3x3 in half types (where a transformed weight that is stored in half loses nothing that shows), and
            ``tensor_core`` for half types and depthwise weights on CUDA; and ``strassen`` for 1x1 in float32 from 48 inputs
            and 57 outputs up.

    Returns:
        1-D tensor on the weight's device; float64 for float64 weights, else float32. Its layout does not depend on the
        CPU or the device, so it may be saved and loaded elsewhere. ``unpack_conv2d_weight`` is the inverse.

    Raises:
        RuntimeError: the weight is not 4-D, ``groups`` does not divide its outputs, or the algorithm does not take the
            weight (ValueError in the fallback).
    """
    with torch.no_grad():
        if can_run_compact_conv2d(weight).ok:
            return torch.ops.lightning_prune.pack_conv2d_weight(weight, groups, algorithm)
        return reference.pack_conv2d_weight(weight, groups, "direct" if algorithm == "auto" else algorithm)


def compact_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Inference convolution with bias, residual add, activation, channel gather and channel scatter-add in one pass.

    Without ``out_index``: ``y = act(conv(x[:, in_index]) + bias + residual)``. With it, the outputs are added to the
    listed channels of a copy of ``residual`` and the activation applies to **all** channels of the sum, also to
    those no output is added to: ``y = act(residual.index_add(1, out_index, conv(x[:, in_index]) + bias))``.

    Args:
        x: shape (N, Cx, H, W); float32, float64, bfloat16 or float16; any strides.
        packed: from :func:`pack_conv2d_weight`.
        bias: shape (O,) or None; x's dtype or the packed dtype.
        residual: shape (N, O, H', W') or, with ``out_index``, (N, R, H', W') of any width R; x's dtype; or None.
        in_index: int64 channels of x that are the convolution's inputs, in this order, repeats allowed; None for all.
        out_index: one distinct int64 channel of ``residual`` per output, in any order; None for 0 .. O-1.
        weight_shape: (O, C / groups, kh, kw) of the weight that was packed.
        stride: one or two integers.
        padding: one or two integers, zeros.
        dilation: one or two integers.
        groups: as in ``torch.nn.functional.conv2d``.
        activation: none, relu, relu6, silu, hardswish, gelu or sigmoid.

    Returns:
        Tensor of x's dtype, in channels_last when x is. Half types are storage: arithmetic and accumulation are float32
        in every algorithm, and results round once. With
        ``tensor_core`` weights the channels of a pixel are followed by room for a multiple of 8, as the next such
        convolution reads them in place (other tensors are copied first).

    Raises:
        RuntimeError: a shape, dtype, device or index does not fit (ValueError or RuntimeError in the fallback).

    Accuracy of float32 on the CPU against float64, without bias and activation. With u = 2**-24 and n the products that are
    added one after the other (``C / groups * kh * kw`` directly; with transforms ``C`` + 32, of stride 2 ``4 C`` + 32,
    ``strassen`` ``2 C`` + 32), :func:`lightning_prune.ops.error_bounds.error_bound` gives two bounds of the largest error of
    a map:

    - Usually at most ``sqrt(n) u`` times 2 (direct, ``strassen``), 3 (``winograd2`` and ``winograd4_stride2`` of 3x3) or 6
      (the others), relative to the map's largest sum of ``|x| * |weight|``: 2.9e-6, 1.8e-6 and 3.5e-6 for 3x3 of 64 channels
      directly, by ``winograd2`` and by ``winograd4``. The tests hold it for up to 700 channels with random values, values
      over eight orders of magnitude, large offsets, spikes, alternating signs and random values of one sign.
    - For every input: directly at most ``n u`` of each result's own sum of ``|x| * |weight|``; with transforms at most
      ``n u`` times 16 (``winograd2`` of 3x3), 61 (``winograd4_stride2`` of 3x3), 15 (``strassen``) or 158 (the others) of the
      largest ``|x|`` times the largest sum of ``|weight|`` of an output. Equal products, whose roundings all go the same way,
      come closest, relative to their sum: with 700 channels of 0.1 the error is 9e-6 (1x1), 7e-5 (3x3) and 1.7e-4 (7x7)
      directly, 1.4e-5 by ``winograd4`` and 3e-5 to 5e-5 by the transforms of stride 2. oneDNN, which torch calls, adds up
      shorter sums: 8e-7, 2e-5 and 6e-5 there.

    An output of a Winograd tile has an error relative to the largest sum of its tile, not to its own. ``strassen`` also adds
    inputs of the two pixels of a pair, and weights of a unit's 64 outputs, before it multiplies: its usual error, too, is
    relative to the largest ``|x|`` times the largest sum of ``|weight|``, also where most inputs meet weights of zero, and
    infinities and NaN may reach all outputs of the other pixel (at most 27 further on).

    Half types add one rounding of the result: 2**-8 (bfloat16) or 2**-11 (float16) of its size, and 2**-25 in float16, whose
    smallest values are further apart. A transformed weight that is stored in half, as ``auto`` does for 3x3, is rounded too:
    with ``winograd2`` of 3x3 that usually adds at most two such roundings of the largest sum of ``|x| * |weight|``.

    There is no gradient: an input that requires one is computed by the reference, which has one.
    """
    arguments = (list(weight_shape), pair(stride), pair(padding), pair(dilation), groups, activation)
    if can_run_compact_conv2d(x).ok:
        return torch.ops.lightning_prune.compact_conv2d(
            x, packed, bias, residual, in_index, out_index, *arguments
        )
    return reference.compact_conv2d(x, packed, bias, residual, in_index, out_index, *arguments)


def prepared_settings(
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
) -> list[int]:
    """All that is no tensor among the arguments of :func:`compact_conv2d`, as 12 integers.

    ``torch.ops.lightning_prune.compact_conv2d_prepared(x, packed, bias, residual, in_index, out_index, settings)`` is the
    compiled operator of one convolution that is called often: handing over lists and strings costs microseconds, in every
    call.

    Raises:
        KeyError: the activation is not in ``ACTIVATIONS``.
    """
    pairs = (*pair(stride), *pair(padding), *pair(dilation))
    return [*map(int, weight_shape), *pairs, int(groups), _PLACES[activation]]
