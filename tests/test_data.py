"""The data modules: separate scans, determinism, what a canvas shows."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_prune.data import (
    ClutteredDigitsDataModule,
    DigitsDataModule,
    EpochShuffle,
    TensorPairs,
    cluttered_canvases,
    load_scans,
    split_scans,
)


def test_scans_are_those_of_scikit_learn() -> None:
    images, labels = load_scans()
    bunch = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal((images[:, 0] * 16).to(torch.int64), torch.from_numpy(bunch.images).to(torch.int64))
    assert labels.tolist() == bunch.target.tolist()


def test_split_is_a_partition_with_equal_class_shares() -> None:
    _, labels = load_scans()
    parts = split_scans(labels, val=0.15, test=0.25, seed=3)
    together = torch.cat(list(parts.values()))
    assert sorted(together.tolist()) == list(range(len(labels)))
    for part, share in (("val", 0.15), ("test", 0.25)):
        for label in range(10):
            members = int((labels == label).sum())
            assert abs(int((labels[parts[part]] == label).sum()) - share * members) <= 0.5


def test_split_depends_on_the_seed_only() -> None:
    _, labels = load_scans()
    again = split_scans(labels, seed=1)
    for part, rows in split_scans(labels, seed=1).items():
        assert torch.equal(rows, again[part])
    assert not torch.equal(split_scans(labels, seed=2)["test"], again["test"])


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.2), (0.2, -0.1), (0.6, 0.4)])
def test_split_refuses_shares_that_leave_nothing(val: float, test: float) -> None:
    with pytest.raises(ValueError, match="val and test"):
        split_scans(torch.arange(10), val=val, test=test)


def test_canvases_are_a_function_of_the_seed() -> None:
    images, labels = load_scans()
    first, first_labels = cluttered_canvases(images, labels, 40, seed=5, chunk=16)
    second, second_labels = cluttered_canvases(images, labels, 40, seed=5, chunk=16)
    other, _ = cluttered_canvases(images, labels, 40, seed=6, chunk=16)
    assert torch.equal(first, second)
    assert torch.equal(first_labels, second_labels)
    assert not torch.equal(first, other)
    assert first.shape == (40, 3, 32, 32)
    assert first.min() >= 0.0
    assert first.max() <= 1.0


def test_canvases_do_not_touch_the_global_random_state() -> None:
    images, labels = load_scans()
    before = torch.get_rng_state()
    cluttered_canvases(images, labels, 4, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_canvas_shows_its_digit_where_it_should_be() -> None:
    """With one scan, full size, no clutter and no noise, the ink on the canvas is that scan, enlarged."""
    scan = torch.zeros(1, 1, 8, 8)
    scan[0, 0, 2:6, 1:3] = 1.0
    canvas, labels = cluttered_canvases(
        scan, torch.tensor([7]), 1, canvas=32, distractors=0, digit_size=(32.0, 32.0), noise=0.0
    )
    ink = canvas[0].mean(0) > 0.45  # the background is at most 0.3, a digit's colour at least 0.6
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[8:24, 4:12] = True
    assert (ink != expected).sum() <= 64  # bilinear edges, one pixel around
    assert ink[9:23, 6:10].all()
    assert not ink[:, 16:].any()
    assert labels.tolist() == [7]


def test_digits_move_and_scale_within_the_canvas() -> None:
    scan = torch.ones(1, 1, 8, 8)
    canvas, _ = cluttered_canvases(
        scan, torch.tensor([0]), 200, distractors=0, digit_size=(10.0, 20.0), noise=0.0, seed=2
    )
    ink = canvas.mean(1) > 0.45
    widths = ink.any(1).sum(1)
    lefts = ink.any(1).float().argmax(1)
    assert widths.min() >= 8
    assert widths.max() <= 21
    assert widths.unique().numel() > 5
    assert lefts.unique().numel() > 8


def test_fragments_are_drawn_from_the_given_scans_only() -> None:
    """Empty scans give empty fragments: nothing but the background is on the canvas."""
    canvas, _ = cluttered_canvases(torch.zeros(3, 1, 8, 8), torch.arange(3), 20, distractors=8, noise=0.0)
    assert canvas.max() <= 0.3 + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digit_size": (40.0, 50.0)}, "digit_size"),
        ({"fragment": 9}, "fragment"),
        ({"distractors": -1}, "distractors"),
    ],
)
def test_canvases_refuse_sizes_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluttered_canvases(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), 1, **arguments)


def test_digits_module_splits_the_scans() -> None:
    dm = DigitsDataModule(batch_size=50, seed=0)
    sizes = {part: len(dm.part(part)) for part in ("train", "val", "test")}
    assert sum(sizes.values()) == 1797
    rows = [tuple(row.flatten().tolist()) for part in sizes for row in dm.part(part).inputs]
    scans = {tuple((row * 2 - 1).flatten().tolist()) for row in load_scans()[0]}
    assert set(rows) == scans
    assert len(dm.train_dataloader()) == sizes["train"] // 50
    assert sum(len(labels) for _, labels in dm.test_dataloader()) == sizes["test"]


def test_digits_module_takes_fewer_training_scans_and_leaves_the_test_alone() -> None:
    few, full = DigitsDataModule(num_train=100), DigitsDataModule()
    assert len(few.part("train")) == 100
    assert torch.equal(few.part("test").inputs, full.part("test").inputs)
    with pytest.raises(ValueError, match="training scans"):
        DigitsDataModule(num_train=5000).setup()


def test_cluttered_module_sizes_range_and_parts() -> None:
    dm = ClutteredDigitsDataModule(batch_size=8, num_train=40, num_val=10, num_test=20, canvas=28)
    assert dm.input_shape == (3, 28, 28)
    assert [len(dm.part(part)) for part in ("train", "val", "test")] == [40, 10, 20]
    inputs, labels = next(iter(dm.train_dataloader()))
    assert inputs.shape == (8, 3, 28, 28)
    assert inputs.min() >= -1
    assert inputs.max() <= 1
    assert labels.dtype == torch.int64
    assert not torch.equal(dm.part("train").inputs[:10], dm.part("val").inputs)
    with pytest.raises(ValueError, match="num_val"):
        ClutteredDigitsDataModule(num_val=0)
    with pytest.raises(ValueError, match="must be one of"):
        dm.part("training")


def test_loader_gives_each_sample_once_and_pairs_it_with_its_label() -> None:
    pairs = TensorPairs(torch.arange(10.0), torch.arange(10))
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=4, collate_fn=lambda b: b, sampler=EpochShuffle(10, 0)
    )
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert sorted(torch.cat([x for x, _ in batches]).tolist()) == list(range(10))
    for x, y in batches:
        assert torch.equal(x.long(), y)
    with pytest.raises(ValueError, match="one label per input"):
        TensorPairs(torch.zeros(3), torch.zeros(2))


def test_shuffle_depends_on_seed_and_epoch() -> None:
    sampler = EpochShuffle(50, seed=4)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert sorted(second) == list(range(50))
    resumed = EpochShuffle(50, seed=4)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_lightning_advances_the_shuffle_epoch() -> None:
    """The trainer calls set_epoch, so two epochs of one fit see different orders."""
    orders: list[list[int]] = []

    class Spy(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[int] = []

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.seen += batch[1].tolist()
            return self.weight * 1.0

        def on_train_epoch_end(self) -> None:
            orders.append(self.seen)
            self.seen = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    pairs = TensorPairs(torch.zeros(32, 1), torch.arange(32))
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=8, collate_fn=lambda b: b, sampler=EpochShuffle(32, 0)
    )
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Spy(), loader)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(32))
    assert orders[0] != orders[1]
