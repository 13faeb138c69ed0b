"""A representative dozen of the zoo: segmenters, detectors, generators, recurrences, 1-D, 3-D, several inputs and outputs.

The whole zoo, with timm's architectures and a peer, is ``make zoo``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_prune import CompactionPlan, compact, mask_channels, max_relative_error, trace_channels
from lightning_prune.channels.trial import random_mask

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: least share of the weight matrices' elements that touch a prunable dimension
DOZEN = {
    "unet": 0.9, "yolo": 0.9, "fpn": 0.9, "deeplab_aspp": 0.9, "edsr": 0.9, "dcgan": 0.9, "shufflenet_v1": 0.8,
    "shufflenet_v2": 0.9, "volume": 0.9, "wavenet": 0.8, "siamese": 0.9, "conv_gru": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", sorted(DOZEN))
def test_thinned_at_random_it_equals_its_masked_twin(name: str) -> None:
    from zoo_own import OWN
    from zoo_worker import calibrate, share

    build, shape = OWN[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    calibrate(model, x)
    graph = trace_channels(model, x)
    assert share(model, graph) >= DOZEN[name]
    for seed in (7, 8):
        plan = CompactionPlan.from_mask(graph, random_mask(graph, 0.3, seed=seed))
        smaller, masked = compact(model, x, plan), mask_channels(model, x, plan)
        assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
        for inputs in (x, torch.randn_like(x)):
            assert max_relative_error(masked, smaller, inputs) <= 1e-5
