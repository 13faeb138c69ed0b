"""Inputs on which float32 sums err most, the bounds that they are held to, and packed weights with one way to use them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune import ops
from lightning_prune.ops import reference
from lightning_prune.ops.error_bounds import ErrorBound, error_bound

KINDS = ("normal", "relu", "offset", "range", "spikes", "alternating", "positive", "constant")
#: what weights each kind of input meets
WEIGHTS = {"positive": ("normal", "positive"), "constant": ("normal", "positive", "constant")}


def inputs_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if kind == "offset":
        return x + 100
    if kind == "range":  # eight orders of magnitude between neighbouring values
        return x * 10 ** (8 * torch.rand(shape, generator=generator) - 4)
    if kind == "pixels":  # the other pixel of a pair is a million times as large
        return x * 10 ** (6 * torch.rand(1, 1, *shape[2:], generator=generator).round())
    if kind == "channels":  # so is the other half of the inputs
        return x * 10 ** (6 * (torch.arange(shape[1]) * 2 < shape[1]).float())[:, None, None]
    if kind == "spikes":
        return x + 1e4 * (torch.rand(shape, generator=generator) < 0.01)
    if kind == "alternating":  # the sign pattern that the transforms amplify most
        rows, columns = (torch.arange(size) % 2 * 2 - 1 for size in shape[2:])
        return torch.ones(shape) * columns * rows[:, None]
    if kind == "positive":
        return torch.rand(shape, generator=generator)
    if kind == "constant":  # every rounding of a sum goes the same way
        return torch.full(shape, 0.1)
    return x.relu() if kind == "relu" else x


def weights_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator)
    side = shape[-1]
    alternating = torch.arange(side**2).view(side, side) % 2 * 2 - 1
    if kind == "positive":
        return torch.rand(shape, generator=generator)
    if kind == "constant":
        return torch.full(shape, 0.1)
    if kind == "alternating":
        return weight.abs() * alternating
    if kind == "phases":  # alternating along the taps of one phase of a stride of 2
        return weight.abs() * alternating[:, :1].repeat_interleave(2, 0)[:side]
    if kind == "range":
        return weight * 10 ** (8 * torch.rand(shape, generator=generator) - 4)
    if kind == "half zero":  # of the inputs that "channels" makes large
        weight[:, : shape[1] // 2] = 0
    if kind == "opposite":  # in the two halves of a unit of Strassen's algorithm
        weight[32:64] = -weight[:32]
    return weight


@dataclass(frozen=True)
class AccuracyCase:
    """One convolution; equal cases have equal tensors."""

    inputs: str
    weights: str
    channels: int
    outputs: int
    kernel: int
    stride: int = 1
    size: int = 14
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.outputs, self.channels // self.groups, self.kernel, self.kernel

    @property
    def settings(self) -> tuple[int, int, int, int]:
        return self.stride, self.kernel // 2, 1, self.groups

    def tensors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.channels)
        x = inputs_of(self.inputs, (1, self.channels, self.size, self.size), generator)
        weight = weights_of(self.weights, self.weight_shape, generator)
        return x.to(memory_format=torch.channels_last), weight


@lru_cache(maxsize=512)
def exact(case: AccuracyCase) -> tuple[Tensor, Tensor]:
    """The convolution in float64, and the sums of its absolute products."""
    x, weight = (t.double() for t in case.tensors())
    return F.conv2d(x, weight, None, *case.settings), F.conv2d(x.abs(), weight.abs(), None, *case.settings)


def only_transform(packed: Tensor, weight_shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """NaN in the place of the weights that are summed directly."""
    packed = packed.clone()
    packed[: reference.packed_size(weight_shape, groups)] = torch.nan
    return packed


def only_direct(packed: Tensor, weight_shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """NaN in the place of the transformed weights."""
    packed = packed.clone()
    packed[reference.packed_size(weight_shape, groups) :] = torch.nan
    return packed


def convolve(case: AccuracyCase, algorithm: str) -> Tensor:
    """By this algorithm and no other: where a transform is not taken, results are NaN."""
    x, weight = case.tensors()
    packed = ops.pack_conv2d_weight(weight, case.groups, algorithm)
    if algorithm != "direct":
        packed = only_transform(packed, case.weight_shape)
    return ops.compact_conv2d(x, packed, None, None, None, None, case.weight_shape, *case.settings)


def check_accuracy(case: AccuracyCase, algorithm: str) -> None:
    """The bounds that the docstring of ``compact_conv2d`` states."""
    y, (wanted, sums) = convolve(case, algorithm), exact(case)
    errors = (y.double() - wanted).abs()
    assert errors.isfinite().all(), f"{algorithm} was not taken by {case}"
    x, weight = case.tensors()
    largest = float(x.abs().max()) * float(weight.double().abs().sum((1, 2, 3)).max())
    bound: ErrorBound = error_bound(case.weight_shape, algorithm)
    tiny = 2.0**-149
    if algorithm == "direct":
        assert (errors <= bound.worst * sums + tiny).all(), (algorithm, case)
    else:
        assert float(errors.max()) <= bound.worst * largest + tiny, (algorithm, case)
    if case.weights != "constant":
        scale = largest if algorithm == "strassen" else float(sums.max())
        assert float(errors.max()) <= bound.usual * scale, (algorithm, case, float(errors.max()) / scale)
