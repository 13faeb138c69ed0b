"""The table of error bounds, and algorithms that are chosen under a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_prune.ops.error_bounds import ERROR_BOUNDS, error_bound
from lightning_prune.ops.winograd import _POINTS, STRIDED, TRANSFORMED, algorithm_for, transform_matrix


def amplification(tile: int, kernel: int) -> float:
    """Largest sum over the points of ``|A| |G| sum |B|`` that leads from a tap to a result, along both sides."""
    outputs, step = tile % STRIDED, 1 if tile < STRIDED else 2
    points = _POINTS[outputs + (kernel - 1) // step]
    # Rows of the transform of inputs are the coefficients of polynomials that vanish at all other points.
    inputs = [np.poly([q for j, q in enumerate(points) if j != i]) for i in range(len(points))] + [
        np.poly(points)
    ]
    lengths = torch.tensor([float(np.abs(row).sum()) for row in inputs], dtype=torch.float64)
    powers = torch.tensor(
        [[abs(p) ** i for p in points] + [0.0] for i in range(outputs)], dtype=torch.float64
    )
    powers[-1, -1] = 1.0
    weights = transform_matrix(tile, kernel).abs().unflatten(0, (step, -1))
    return float(torch.einsum("ip,spa,p->sia", powers, weights, lengths).max()) ** 2


def test_the_table_is_that_of_the_points() -> None:
    listed = {(name, side) for name, (_, sides) in TRANSFORMED.items() for side in sides}
    assert listed == set(ERROR_BOUNDS)
    for (name, side), rounding in ERROR_BOUNDS.items():
        if name != "strassen":
            assert rounding.worst - 1 < amplification(TRANSFORMED[name][0], side) <= rounding.worst + 1e-9, (
                name
            )
    with pytest.raises(
        ValueError, match="no error bound for 'winograd4' of 5x5; there are direct, winograd2 for 3x3"
    ):
        error_bound((8, 8, 5, 5), "winograd4")
    with pytest.raises(ValueError, match="of 3x5"):
        error_bound((8, 8, 3, 5), "winograd2")


@pytest.mark.parametrize(
    ("shape", "stride", "size", "names"),
    [
        ((64, 64, 3, 3), 1, 28, ("winograd4", "winograd2")),
        ((256, 256, 3, 3), 1, 7, ("winograd2",)),  # few tiles
        ((64, 64, 5, 5), 1, 28, ("winograd2",)),
        ((256, 128, 1, 1), 1, 14, ("strassen",)),
        ((256, 128, 3, 3), 2, 14, ("winograd5_stride2", "winograd4_stride2")),
        ((37, 3, 7, 7), 2, 112, ("winograd3_stride2",)),
        ((8, 8, 3, 3), 1, 28, ()),
        ((64, 64, 3, 5), 1, 28, ()),
    ],
)
def test_a_bound_excludes_larger_tiles(
    shape: tuple[int, ...], stride: int, size: int, names: tuple[str, ...]
) -> None:
    """Each bound that no longer allows an algorithm gives the next faster one."""
    limit, images = 1.0, 1 if size == 7 else 8
    for name in names:
        usual = error_bound(shape, name).usual
        assert usual < limit
        assert algorithm_for(shape, images, size, size, stride, max_error=limit) == name
        assert algorithm_for(shape, images, size, size, stride, max_error=usual) == name
        limit = usual * 0.999
    assert algorithm_for(shape, images, size, size, stride, max_error=limit) == "direct"
    assert algorithm_for(shape, images, size, size, stride, max_error=0) == "direct"
