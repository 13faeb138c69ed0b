"""One level of Strassen's algorithm for 1x1 convolutions: the reference of its weight transform, and where it pays.

A 1x1 convolution is the product of pixels by inputs and inputs by outputs. Halving all three gives eight products of quarters;
Strassen (1969) does with seven, and Winograd's form of it with 15 sums, of which four are of weights and done in advance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: code of the transform among the tiles of ``ops/winograd.py``
STRASSEN = 1
#: outputs of one half of a unit; csrc/include/lp_params.h has the same
HALF = 32
# Inputs from which "auto" takes it: with fewer a product takes not much longer than loading and storing what products share.
AUTO_MIN_CHANNELS = 48
# Pixels that it takes, and those where the weight is so large that a network's other ones drive it out of L2.
MIN_PIXELS, MANY_PIXELS, LARGE_WEIGHT = 48, 96, 150_000
# Results from which writing them to memory takes as long as computing them from fewer than so many inputs.
MOST_RESULTS, FEW_CHANNELS = 4 << 20, 96


def strassen_units(outputs: int) -> int:
    """Units of 64 outputs that are computed so; the last one may have up to 7 too few, the others are summed directly."""
    return (outputs + 7) // (2 * HALF)


def strassen_pays(weight_shape: Sequence[int]) -> bool:
    """Whether seven products are faster than eight, once there are some pixels.

    Args:
        weight_shape: (O, C, 1, 1).
    """
    return strassen_units(int(weight_shape[0])) > 0 and weight_shape[1] >= AUTO_MIN_CHANNELS


def strassen_gains(weight_shape: Sequence[int], pixels: int) -> bool:
    """Whether so many pixels make up for 1.75 times as many weights, and do not take all the time to be written.

    Args:
        weight_shape: (O, C, 1, 1).
        pixels: of all images that are computed together.
    """
    large = weight_shape[0] * weight_shape[1] >= LARGE_WEIGHT
    written = weight_shape[1] < FEW_CHANNELS and pixels * weight_shape[0] > MOST_RESULTS
    return strassen_pays(weight_shape) and not written and pixels >= (MANY_PIXELS if large else MIN_PIXELS)


def strassen_shape(weight_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape of :func:`strassen_weight`."""
    return HALF * strassen_units(int(weight_shape[0])), (int(weight_shape[1]) + 1) // 2, 1, 7


def strassen_weight(weight: Tensor) -> Tensor:
    """What the inputs of the seven products are multiplied with; computed in float64, rounded once.

    With an odd number of inputs the one in the middle is in both halves, with a weight of zero in the second.

    Args:
        weight: shape (O, C, 1, 1).

    Returns:
        Shape (32 per unit of 64 outputs, C / 2 rounded up, 1, 7): B11, B21, B22 - B12 + B11, B22 - B12,
        B21 - B22 + B12 - B11, B12 - B11, B22, where the first index is the half of the inputs and the second that of the unit.
    """
    lanes, depth, _, _ = strassen_shape(weight.shape)
    first = weight[:, :depth, 0, 0].double()
    second = weight[:, weight.shape[1] - depth :, 0, 0].double().clone()
    second[:, : 2 * depth - weight.shape[1]] = 0
    padded = torch.zeros(2, 2 * lanes, depth, dtype=torch.float64, device=weight.device)
    kept = min(2 * lanes, weight.shape[0])
    padded[0, :kept], padded[1, :kept] = first[:kept], second[:kept]
    b11, b12, b21, b22 = (
        padded.unflatten(1, (lanes // HALF, 2, HALF)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    )
    t1 = b12 - b11
    t2 = b22 - t1
    products = torch.stack([b11, b21, t2, b22 - b12, b21 - t2, t1, b22], -1)
    return products.unsqueeze(2).to(weight.dtype)


__all__ = [
    "STRASSEN",
    "strassen_gains",
    "strassen_pays",
    "strassen_shape",
    "strassen_units",
    "strassen_weight",
]
