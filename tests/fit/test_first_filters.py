"""The first layer's filters before and after a fit, and their picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.image import imread
from torch import nn

from lightning_prune.outcome import FirstFilters
from lightning_prune.plots import plot_filters
from tests.fit.test_callback import pruner
from tests.fit.toys import ToyModule, loader, toy_fit, trainer


def test_filters_of_the_first_convolution_before_and_after(tmp_path: Path) -> None:
    torch.manual_seed(0)
    initial = ToyModule().net.conv1.weight.detach().clone()
    callback = pruner(target=0.3)
    assert callback.first_filters is None
    options: dict[str, Any] = {"dirpath": tmp_path, "save_top_k": -1, "filename": "{epoch}"}
    module = toy_fit([callback, ModelCheckpoint(**options)], enable_checkpointing=True)
    found = callback.first_filters
    assert found.module == "net.conv1"
    assert torch.equal(found.before, initial)
    assert torch.equal(found.after, module.net.conv1.weight)
    removed = callback.plan.removed["net.conv1"]
    assert removed == (~found.live).nonzero().flatten().tolist() != []
    assert not found.after[removed].any()

    again = pruner(target=0.3)
    fit = trainer([again, ModelCheckpoint(**options)], 5, enable_checkpointing=True)
    fit.fit(ToyModule(), loader(), loader(24), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert torch.equal(again.first_filters.before, initial), "those of the first start, not of the resumption"


def test_a_network_without_convolutions_has_none() -> None:
    class Dense(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))

    callback = pruner()
    trainer([callback], 5).fit(Dense(), loader())
    assert callback.first_filters is None


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_picture(channels: int, tmp_path: Path) -> None:
    before, after = torch.randn(10, channels, 3, 1), torch.randn(10, channels, 3, 1)
    before[0, 0, 0, 0] = 9.0  # the scale of colours is that of the largest weight
    live = torch.ones(10, dtype=torch.bool)
    pictures = []
    for i in range(2):
        path = plot_filters(
            FirstFilters("conv", before, after * live[:, None, None, None], live), tmp_path / f"{i}.png"
        )
        pictures.append(imread(path)[..., :3])
        live = live.clone()
        live[4] = False
    whole, pruned = pictures
    changed = np.argwhere(np.abs(whole - pruned).max(axis=2) > 0.02)
    assert len(changed)
    half = whole.shape[1] / 2
    title = 0.2 * whole.shape[0]
    for columns in (
        changed[:, 1] < half,
        changed[:, 1] >= half,
    ):  # filter 4 stands at the same place in both halves
        place = changed[columns & (changed[:, 0] > title)][:, 1] % half / half
        assert len(place)
        assert place.min() > 3.5 / 8
        assert place.max() < 5.2 / 8
    with pytest.raises(ValueError, match="2-d convolution"):
        plot_filters(FirstFilters("conv", before[..., 0], after[..., 0], live), tmp_path / "no.png")
