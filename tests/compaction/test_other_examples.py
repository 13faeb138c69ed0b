"""Compaction is also checked on a second input of other sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.channels import trace_channels
from lightning_prune.compaction import compact
from lightning_prune.compaction.verify import other_examples
from lightning_prune.errors import CompactionError
from tests.channels.networks import build, conv, head, image
from tests.compaction.test_compaction import random_plan


def test_other_examples_change_batch_and_space_but_not_channels() -> None:
    shapes = [x.shape for x in other_examples(torch.randn(4, 3, 224, 160))]
    assert shapes == [(1, 3, 96, 64), (1, 3, 224, 160)]
    both = next(
        iter(other_examples({"image": torch.randn(1, 3, 16, 16), "ids": torch.randint(0, 9, (1, 5))}))
    )
    assert both["image"].shape == (2, 3, 48, 48)
    assert both["ids"].shape == (2, 5)
    assert both["ids"].dtype == torch.int64
    assert int(both["ids"].max()) < 9


def test_inputs_keep_their_scale() -> None:
    (wide, _) = other_examples(torch.randn(2, 3, 64, 64) * 5 + 100)
    assert 4 < float(wide.std()) < 6
    assert 99 < float(wide.mean()) < 101


def test_sizes_that_the_dense_network_refuses_are_skipped() -> None:
    model, x = build("FlattenLinear"), image()
    compact(model, x, random_plan(trace_channels(model, x)))


class SizeDependent(nn.Module):
    """Takes another path for a single image, where a number of channels is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[0] == 1:
            x = x.reshape(1, 8, *x.shape[2:])
        return self.head(self.b(x))


def test_a_path_that_only_another_batch_size_takes_is_checked() -> None:
    model, x = SizeDependent(), image()
    plan = random_plan(trace_channels(model, x))
    with pytest.raises(CompactionError, match="shape"):
        compact(model, x, plan)


class Flat(nn.Module):
    """``view(-1, n)`` turns one large image into several samples instead of refusing it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.out = conv(3, 8), nn.MaxPool2d(4), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(self.a(x)).view(-1, 8 * 16))


def test_images_read_as_several_samples_are_no_counterexample() -> None:
    model, x = Flat(), image()
    assert model(image(1, 48)).shape == (9, 5)
    small = compact(model, x, random_plan(trace_channels(model, x)))
    assert small(image(4)).shape == (4, 5)
