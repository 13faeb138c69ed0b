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
# Interpolation points beside 0 and infinity. The square roots keep the matrices of F(4x4) well conditioned.
_POINTS = {2: (1.0, -1.0), 4: (0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))}


def winograd_tile(weight: Tensor, groups: int, algorithm: str) -> int:
    """Side of the output tile whose transformed weights ``algorithm`` asks for; 0 for none.

    Raises:
        ValueError: an unknown algorithm, or a Winograd algorithm for a weight it does not take.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    shape = tuple(weight.shape)
    fits = shape[2:] == (3, 3) and groups == 1 and weight.dtype == torch.float32 and not weight.is_cuda
    if algorithm == "auto":
        return 4 if fits and min(shape[0], shape[1]) >= AUTO_MIN_CHANNELS else 0
    if algorithm in ("direct", "tensor_core"):
        return 0
    if not fits:
        raise ValueError(
            f"algorithm {algorithm!r} takes float32 weights of shape (O, C, 3, 3) on the CPU with groups=1; got "
            f"{weight.dtype} of shape {shape} on {weight.device.type} with groups={groups}"
        )
    return 2 if algorithm == "winograd2" else 4


def transform_matrix(tile: int) -> Tensor:
    """G, float64, shape (tile + 2, 3): the transformed weight is ``G @ w @ G.T``."""
    rows = []
    points = (0.0, *_POINTS[tile])
    for i, p in enumerate(points):
        norm = 1.0
        for j, q in enumerate(points):
            norm *= p - q if i != j else 1.0
        # The transform of the input leaves the sign of the row for 0 out.
        norm = abs(norm) if p == 0 else norm
        rows.append([1 / norm, p / norm, p * p / norm])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """The weight at the Winograd points, shape (O, C, tile + 2, tile + 2); computed in float64, rounded once."""
    g = transform_matrix(tile).to(weight.device)
    return (g @ weight.double() @ g.T).to(weight.dtype)


def transformed_shape(weight_shape: Sequence[int], tile: int) -> tuple[int, int, int, int]:
    """Shape of :func:`transform_weight`."""
    return int(weight_shape[0]), int(weight_shape[1]), tile + 2, tile + 2
