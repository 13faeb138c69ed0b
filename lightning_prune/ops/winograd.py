"""Which algorithm a packed weight carries, and the reference of the Winograd weight transform.

A packed weight always begins with the direct layout. Behind it may lie the weight transformed for Winograd convolution (or, for
1x1, Strassen's algorithm, see ``ops/strassen.py``), so the number of elements says which algorithm it was packed for, and every
operator, device and dtype can still use the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .error_bounds import error_bound
from .strassen import STRASSEN, strassen_gains, strassen_pays, strassen_shape, strassen_weight

#: stride 2: a tile's code is so much more than the side of its outputs
STRIDED = 16
#: names of the algorithms with transformed weights, with the codes of their tiles and the kernel sides that they take
TRANSFORMED = {
    "winograd2": (2, (3, 5)),
    "winograd4": (4, (3,)),
    "winograd3_stride2": (STRIDED + 3, (7,)),
    "winograd4_stride2": (STRIDED + 4, (3, 5)),
    "winograd5_stride2": (STRIDED + 5, (3,)),
    "strassen": (STRASSEN, (1,)),
}
ALGORITHMS = ("auto", "direct", *TRANSFORMED, "tensor_core")
# Smallest channel counts for which "auto" packs Winograd weights: below, the direct kernels are as fast.
AUTO_MIN_CHANNELS = 9
# Inputs times outputs from which up to four 4x4 tiles are dearer than sixteen 2x2 ones: the transform leaves the L2 cache.
FEW_TILES_LARGE_WEIGHT = 200 * 200
# Stride 2: channels, and inputs times outputs of 3x3, for which transforms pay, multiplications that every weight which a
# transform adds must save (it may come from memory), and added weights beyond which nothing is packed for a size that is not
# known.
STRIDED_MIN_CHANNELS, STRIDED_MIN_WEIGHT = 12, 512
STRIDED_SAVED_PER_WEIGHT, STRIDED_MOST_WEIGHTS = 12, 3_600_000
# Interpolation points beside infinity, by their number. The square roots keep the matrices well conditioned.
_POINTS = {
    4: (0.0, 1.0, -1.0),
    5: (0.5, -0.5, 1.25, -1.25),
    6: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5)),
}


def transform_tile(weight: Tensor, groups: int, algorithm: str) -> int:
    """Code of the tile whose transformed weights ``algorithm`` asks for: see ``TRANSFORMED``; 0 for none.

    Raises:
        ValueError: an unknown algorithm, or one with transformed weights for a weight it does not take.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    shape = tuple(weight.shape)
    fits = shape[2] == shape[3] and weight.dtype != torch.float64 and groups == 1 and not weight.is_cuda
    if algorithm == "auto":
        algorithm = _auto(shape, weight.dtype in (torch.bfloat16, torch.float16)) if fits else "direct"
    if algorithm in ("direct", "tensor_core"):
        return 0
    tile, kernels = TRANSFORMED[algorithm]
    if tile == STRASSEN and not (fits and shape[2] == 1 and weight.dtype == torch.float32):
        raise ValueError(
            "algorithm 'strassen' takes float32 weights on the CPU with groups=1 and of shape (O, C, 1, 1); "
            f"got {weight.dtype} of shape {shape} on {weight.device.type} with groups={groups}"
        )
    if not fits or shape[2] not in kernels:
        raise ValueError(
            f"algorithm {algorithm!r} takes float32 or half weights on the CPU with groups=1 and of shape (O, C, k, k), "
            "k = 3 or 5 for winograd2 and winograd4_stride2, 3 for winograd4 and winograd5_stride2, 7 for "
            f"winograd3_stride2; got {weight.dtype} of shape {shape} on {weight.device.type} with groups={groups}"
        )
    return tile


def _auto(weight_shape: Sequence[int], half: bool = False) -> str:
    """What "auto" packs, for weights of one group on the CPU."""
    outputs, channels, kernel, across = weight_shape
    if kernel != across or kernel not in (1, 3, 5):
        return "direct"
    if kernel == 1:
        return "strassen" if not half and strassen_pays(weight_shape) else "direct"
    # half storage rounds the transformed weight too, which only the small tile of 3x3 forgives
    if min(outputs, channels) < AUTO_MIN_CHANNELS or (half and kernel == 5):
        return "direct"
    return "winograd2" if half or kernel == 5 else "winograd4"


def algorithm_for(
    weight_shape: Sequence[int],
    images: int,
    height: int,
    width: int,
    stride: int = 1,
    max_error: float | None = None,
) -> str:
    """The algorithm to pack a weight with when the output's size is known.

    With stride 1 ``auto``, or ``direct`` for a 1x1 of few pixels, or ``winograd2`` where a large weight meets so few 4x4 tiles
    that reading its transform takes longer than computing with it. With stride 2 the tile that multiplies least, edges
    included, or ``direct``.

    Args:
        weight_shape: (O, C, kh, kw).
        images: per call.
        height: of the output.
        width: of the output.
        stride: 1 or 2, along both dimensions.
        max_error: only algorithms whose usual error in float32 for this weight is at most this, see
            :func:`lightning_prune.ops.error_bounds.error_bound`, or ``direct``; 0: ``direct``. None: any.
    """
    outputs, channels, kernel, across = (int(size) for size in weight_shape)
    if stride == 1 and max_error is not None:
        fastest = algorithm_for(weight_shape, images, height, width)
        fastest = _auto(weight_shape) if fastest == "auto" else fastest
        smaller = ("winograd2",) if fastest == "winograd4" else ()
        return next(
            (name for name in (fastest, *smaller) if _within(max_error, weight_shape, name)), "direct"
        )
    if (kernel, across, stride) == (1, 1, 1):
        return "auto" if strassen_gains(weight_shape, images * height * width) else "direct"
    if stride == 2:
        if kernel != across:
            return "direct"
        return _strided_algorithm(outputs, channels, kernel, images, height, width, max_error)
    tiles = images * -(-height // 4) * -(-width // 4)
    large = outputs * channels >= FEW_TILES_LARGE_WEIGHT
    return "winograd2" if large and tiles <= 4 and (kernel, across) == (3, 3) else "auto"


def _within(max_error: float | None, weight_shape: Sequence[int], algorithm: str) -> bool:
    return max_error is None or error_bound(weight_shape, algorithm).usual <= max_error


def _strided_algorithm(
    outputs: int, channels: int, kernel: int, images: int, height: int, width: int, max_error: float | None
) -> str:
    if not _strided_pays(outputs, channels, kernel):
        return "direct"
    before = images * height * width * kernel**2
    found, least = "direct", 0.8 * before
    for name, (tile, kernels) in TRANSFORMED.items():
        if tile < STRIDED or kernel not in kernels:
            continue
        if not _within(max_error, (outputs, channels, kernel, kernel), name):
            continue
        side = tile - STRIDED
        tiles = images * -(-height // side) * -(-width // side)
        per_tile = winograd_products(kernel, channels, tile)
        after, added = tiles * per_tile, per_tile - kernel**2
        if after < least and before - after >= STRIDED_SAVED_PER_WEIGHT * added:
            found, least = name, after
    return found


def _strided_pays(outputs: int, channels: int, kernel: int) -> bool:
    if unites_phases(kernel, channels):
        return channels >= 3 and outputs > 16
    least = STRIDED_MIN_WEIGHT if kernel == 3 else 0
    return min(outputs, channels) >= STRIDED_MIN_CHANNELS and outputs * channels >= least


def strided_default(weight_shape: Sequence[int]) -> str:
    """The algorithm for stride 2 when the output's size is not known.

    Args:
        weight_shape: (O, C, k, k).
    """
    outputs, channels, kernel = (int(size) for size in weight_shape[:3])
    name = {3: "winograd4_stride2", 5: "winograd4_stride2", 7: "winograd3_stride2"}.get(kernel, "direct")
    if name == "direct" or not _strided_pays(outputs, channels, kernel):
        return "direct"
    # what is large has small maps, and takes a multiple of its memory
    weight = winograd_products(kernel, channels, TRANSFORMED[name][0]) * channels * outputs
    return name if weight <= STRIDED_MOST_WEIGHTS else "direct"


def unites_phases(kernel: int, channels: int) -> bool:
    """Whether a stride-2 tile's four phases are channels, not taps: for a few channels."""
    return kernel == 7 and channels <= 4


def winograd_products(kernel: int, channels: int, tile: int) -> int:
    """Multiplications per tile, input channel and output."""
    if tile < STRIDED:
        return (tile + kernel - 1) ** 2
    points = tile - STRIDED + (kernel - 1) // 2
    return 4 * points**2 if unites_phases(kernel, channels) else (2 * points - 1) ** 2


def transform_matrix(tile: int, kernel: int = 3) -> Tensor:
    """G, float64: the transformed weight is ``G @ w @ G.T``.

    Args:
        tile: code of the tile.
        kernel: side of the weight.

    Returns:
        Shape (points, kernel). With stride 2 (2 points, kernel): the rows of the even taps, then those of the odd ones, of
        which the last is zero.
    """
    step = 1 if tile < STRIDED else 2
    points = _POINTS[tile % STRIDED + (kernel - 1) // step]
    matrix = torch.zeros(step, len(points) + 1, kernel, dtype=torch.float64)
    for i, p in enumerate(points):
        norm = 1.0
        for j, q in enumerate(points):
            norm *= p - q if i != j else 1.0
        # The transform of the input leaves the sign of the row for 0 out.
        norm = abs(norm) if p == 0 else norm
        for tap in range(kernel):
            matrix[tap % step, i, tap] = p ** (tap // step) / norm
    matrix[0, -1, kernel - 1] = 1.0
    return matrix.flatten(0, 1)


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """The weight at the Winograd points, or Strassen's sums of it; computed in float64, rounded once.

    Returns:
        Shape of :func:`transformed_shape`. With stride 2 a point has up to four (row phase, column phase), which follow it
        as taps, or as channels for few channels.
    """
    if tile == STRASSEN:
        return strassen_weight(weight)
    kernel, channels = weight.shape[-1], weight.shape[1]
    g = transform_matrix(tile, kernel).to(weight.device)
    full = (g @ weight.double() @ g.T).to(weight.dtype)
    if tile < STRIDED:
        return full
    points = len(g) // 2
    # (O, C, row phase, row, column phase, column) -> row and column of the point, then the phases
    phases = full.unflatten(3, (2, points)).unflatten(2, (2, points)).permute(0, 3, 5, 2, 4, 1)
    if unites_phases(kernel, channels):
        return phases.flatten(3).permute(0, 3, 1, 2)
    last = points - 1
    taps = [
        phases[:, i, j, : 2 - (i == last), : 2 - (j == last)].flatten(1, 2)
        for i in range(points)
        for j in range(points)
    ]
    return torch.cat(taps, 1).permute(0, 2, 1).unsqueeze(2)


def transformed_shape(weight_shape: Sequence[int], tile: int) -> tuple[int, int, int, int]:
    """Shape of :func:`transform_weight`: (O, C, points, points), with stride 2 (O, C, 1, products) or (O, 4 C, 6, 6)."""
    if tile == STRASSEN:
        return strassen_shape(weight_shape)
    outputs, channels, kernel = (int(size) for size in weight_shape[:3])
    side = tile % STRIDED + (kernel - 1) // (1 if tile < STRIDED else 2)
    if tile < STRIDED:
        return outputs, channels, side, side
    if unites_phases(kernel, channels):
        return outputs, 4 * channels, side, side
    return outputs, channels, 1, winograd_products(kernel, channels, tile)
