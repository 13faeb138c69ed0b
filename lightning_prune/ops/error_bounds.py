"""How far float32 results of the CPU's convolutions may be from the exact ones: what docstrings state and tests hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: the most by which rounding to float32 changes a number, relative to it
UNIT = 2.0**-24
#: additions of a transform there and back, beside the sum over channels
TRANSFORM_ADDITIONS = 32


class Rounding(NamedTuple):
    """What an algorithm makes of the roundings of its sums.

    Attributes:
        products: of one channel that are added one after the other.
        usual: the error that sums do not exceed whose roundings go up and down, in sizes of a rounding times the root of their
            number.
        worst: how much the transforms amplify a rounding: the largest sum, over the points, of the absolute entries that lead
            from an input and a weight to a result.
    """

    products: int
    usual: float
    worst: float


#: by algorithm and side of the kernel, for those with transformed weights
ERROR_BOUNDS = {
    ("winograd2", 3): Rounding(1, 3, 16),
    ("winograd4", 3): Rounding(1, 6, 158),
    ("winograd2", 5): Rounding(1, 6, 158),
    ("winograd4_stride2", 3): Rounding(4, 3, 61),
    ("winograd5_stride2", 3): Rounding(4, 6, 158),
    ("winograd4_stride2", 5): Rounding(4, 6, 158),
    ("winograd3_stride2", 7): Rounding(4, 6, 158),
    ("strassen", 1): Rounding(2, 2, 15),
}


class ErrorBound(NamedTuple):
    """Bounds of the error of one convolution's results; see :func:`error_bound` for what they are relative to."""

    usual: float
    worst: float


def error_bound(weight_shape: Sequence[int], algorithm: str = "direct") -> ErrorBound:
    """The largest error of a float32 convolution on the CPU, without bias and activation, against exact arithmetic.

    ``usual``, relative to the largest sum of ``|x| * |weight|`` over a map, is what the tests hold for up to 700 channels with
    random values, values over eight orders of magnitude, large offsets, spikes, alternating signs and random values of one
    sign. It grows with the root of the number of products that are added one after the other.

    ``worst`` holds for every input and grows with that number itself. For ``direct`` it is relative to the sum of ``|x| *
    |weight|`` of each result; with transforms to the map's largest ``|x|`` times the largest sum of ``|weight|`` of an output,
    and so is ``usual`` for ``strassen``: what one pixel or output shares with others has their size. Sums of equal products,
    whose roundings all go the same way, come closest: to a quarter of it directly.

    Args:
        weight_shape: (O, C / groups, kh, kw).
        algorithm: ``direct`` or one with transformed weights that takes this kernel.

    Example:
        >>> from lightning_prune.ops.error_bounds import error_bound
        >>> [f"{bound:.1e}" for bound in error_bound((64, 64, 3, 3))]
        ['2.9e-06', '3.4e-05']
        >>> [f"{bound:.1e}" for bound in error_bound((64, 64, 3, 3), "winograd2")]
        ['1.8e-06', '9.2e-05']
    """
    _, channels, height, width = (int(size) for size in weight_shape)
    if algorithm == "direct":
        products = channels * height * width
        return ErrorBound(2 * math.sqrt(products) * UNIT, products * UNIT)
    rounding = ERROR_BOUNDS.get((algorithm, height))
    if rounding is None or height != width:
        known = ", ".join(f"{name} for {side}x{side}" for name, side in ERROR_BOUNDS)
        raise ValueError(f"no error bound for {algorithm!r} of {height}x{width}; there are direct, {known}")
    additions = rounding.products * channels + TRANSFORM_ADDITIONS
    return ErrorBound(rounding.usual * math.sqrt(additions) * UNIT, rounding.worst * additions * UNIT)


__all__ = ["ERROR_BOUNDS", "ErrorBound", "Rounding", "error_bound"]
