"""Errors of the direct sums and of half types against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_prune import ops
from lightning_prune.ops.error_bounds import error_bound
from tests.ops.accuracy_cases import KINDS, WEIGHTS, AccuracyCase, check_accuracy, inputs_of, weights_of

# (inputs, outputs, side of the kernel, stride, side of the map, groups)
DIRECT = {
    "1x1": [(c, 40, 1, 1, 14, 1) for c in (3, 64, 700)],
    "1x1 of a few pixels": [(700, 40, 1, 1, 1, 1)],
    "3x3": [(c, 24, 3, 1, 14, 1) for c in (3, 64, 700)],
    "3x3 on small maps": [(64, 24, 3, 1, 2, 1), (700, 24, 3, 1, 2, 1)],
    "7x7": [(c, 24, 7, 1, 14, 1) for c in (3, 64, 700)],
    "stride 2": [(64, 24, 3, 2, 14, 1), (700, 24, 3, 2, 14, 1), (3, 24, 7, 2, 29, 1)],
    "planes": [(3, 4, 3, 1, 20, 1), (4, 18, 5, 1, 20, 1), (2, 2, 1, 1, 20, 1)],
    "few outputs": [(65, 5, 3, 1, 14, 1), (7, 20, 3, 1, 14, 1)],
    "depthwise, flat": [(30, 30, k, 1, 14, 30) for k in (3, 5, 7)],
    "depthwise, not flat": [(30, 30, k, 2, 15, 30) for k in (3, 5, 7)],
    "depthwise with more outputs": [(30, 60, 3, 1, 14, 30)],
    "grouped": [(60, 40, 3, 1, 14, 4), (128, 64, 1, 1, 14, 2)],
}


@pytest.fixture(autouse=True)
def on_the_cpu(target: torch.device) -> None:
    if target.type == "cuda":
        pytest.skip("bounds of the CPU kernels")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", DIRECT)
def test_direct_sums(kind: str, shapes: str) -> None:
    for channels, outputs, kernel, stride, size, groups in DIRECT[shapes]:
        for weights in WEIGHTS.get(kind, ("normal", "alternating")):
            case = AccuracyCase(kind, weights, channels, outputs, kernel, stride, size, groups)
            check_accuracy(case, "direct")


@pytest.mark.parametrize("kind", ["normal", "positive", "constant"])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize(
    ("algorithm", "stored"),
    [(None, True), ("direct", False), ("winograd2", False), ("winograd2", True), ("winograd4", False)],
)
def test_half_types_round_once(
    kind: str, dtype: torch.dtype, unit: float, algorithm: str | None, stored: bool
) -> None:
    """And the transformed weight once where it is stored in half, as modules do with what "auto" packs."""
    for channels in (3, 64, 700):
        generator = torch.Generator().manual_seed(channels)
        x = inputs_of(kind, (1, channels, 14, 14), generator).to(dtype)
        x = x.to(memory_format=torch.channels_last)
        weight = (weights_of(kind, (16, channels, 3, 3), generator) / 8).to(dtype)
        wide = x.double(), weight.double()
        exact, sums = F.conv2d(*wide, padding=1), F.conv2d(*(t.abs() for t in wide), padding=1)
        packed = ops.pack_conv2d_weight(weight, 1, algorithm or "auto")
        packed = packed.to(dtype) if stored else packed
        y = ops.compact_conv2d(x, packed, None, None, None, None, list(weight.shape), 1, 1)
        transformed = algorithm == "winograd2" or (algorithm is None and channels > 3)
        bound = error_bound(weight.shape, algorithm or ("winograd2" if transformed else "direct"))
        allowed = unit * exact.abs() + 2.0**-25
        allowed += (bound.worst if kind == "constant" else bound.usual) * sums.max()
        if stored and transformed:
            allowed += 2 * unit * sums.max()
        assert ((y.double() - exact).abs() <= allowed).all(), channels
