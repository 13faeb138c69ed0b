"""Which algorithm a packed weight carries, and the reference of the Winograd weight transform.

A packed weight always begins with the direct layout. Behind it may lie the weight transformed for Winograd convolution, so
the number of elements says which algorithm it was packed for, and every operator, device and dtype can still use the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALGORITHMS = ("auto", "direct", "winograd2", "winograd4", "tensor_core")
# Smallest channel counts for which "auto" packs Winograd weights: below, the direct kernels are as fast.
AUTO_MIN_CHANNELS = 12
# Inputs times outputs from which up to four 4x4 tiles are dearer than sixteen 2x2 ones: the transform leaves the L2 cache.
FEW_TILES_LARGE_WEIGHT = 380 * 380
# Interpolation points beside 0 and infinity, by their number. The square roots keep the matrices well conditioned.
_POINTS = {4: (1.0, -1.0), 6: (0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))}


def winograd_tile(weight: Tensor, groups: int, algorithm: str) -> int:
    """Side of the output tile whose transformed weights ``algorithm`` asks for; 0 for none.

    Raises:
        ValueError: an unknown algorithm, or a Winograd algorithm for a weight it does not take.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    shape = tuple(weight.shape)
    known = shape[2:] in ((3, 3), (5, 5)) and weight.dtype != torch.float64
    fits = known and groups == 1 and not weight.is_cuda
    if algorithm == "auto":
        if not fits or min(shape[0], shape[1]) < AUTO_MIN_CHANNELS:
            return 0
        # half storage rounds the transformed weight too, which only the small tile of 3x3 forgives
        half = weight.dtype in (torch.bfloat16, torch.float16)
        if shape[2] == 5:
            return 0 if half else 2
        return 2 if half else 4
    if algorithm in ("direct", "tensor_core"):
        return 0
    if not fits or (algorithm == "winograd4" and shape[2] != 3):
        raise ValueError(
            f"algorithm {algorithm!r} takes float32 or half weights of shape (O, C, 3, 3), winograd2 also (O, C, 5, 5), on "
            f"the CPU with groups=1; got {weight.dtype} of shape {shape} on {weight.device.type} with groups={groups}"
        )
    return 2 if algorithm == "winograd2" else 4


def algorithm_for(weight_shape: Sequence[int], images: int, height: int, width: int) -> str:
    """The algorithm to pack a stride-1 weight with when the output's size is known.

    ``auto``, or ``winograd2`` where a large weight meets so few 4x4 tiles that reading its transform takes longer than
    computing with it.

    Args:
        weight_shape: (O, C, kh, kw).
        images: per call.
        height: of the output.
        width: of the output.
    """
    tiles = images * -(-height // 4) * -(-width // 4)
    large = int(weight_shape[0]) * int(weight_shape[1]) >= FEW_TILES_LARGE_WEIGHT
    return "winograd2" if large and tiles <= 4 and tuple(weight_shape[2:]) == (3, 3) else "auto"


def transform_matrix(tile: int, kernel: int = 3) -> Tensor:
    """G, float64, shape (tile + kernel - 1, kernel): the transformed weight is ``G @ w @ G.T``."""
    rows = []
    points = (0.0, *_POINTS[tile + kernel - 1])
    for i, p in enumerate(points):
        norm = 1.0
        for j, q in enumerate(points):
            norm *= p - q if i != j else 1.0
        # The transform of the input leaves the sign of the row for 0 out.
        norm = abs(norm) if p == 0 else norm
        rows.append([p**power / norm for power in range(kernel)])
    return torch.tensor([*rows, [0.0] * (kernel - 1) + [1.0]], dtype=torch.float64)


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """The weight at the Winograd points, (O, C, tile + k - 1, tile + k - 1); computed in float64, rounded once."""
    g = transform_matrix(tile, weight.shape[-1]).to(weight.device)
    return (g @ weight.double() @ g.T).to(weight.dtype)


def transformed_shape(weight_shape: Sequence[int], tile: int) -> tuple[int, int, int, int]:
    """Shape of :func:`transform_weight`."""
    side = tile + int(weight_shape[2]) - 1
    return int(weight_shape[0]), int(weight_shape[1]), side, side
