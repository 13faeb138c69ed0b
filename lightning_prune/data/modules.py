"""Data held in memory, and loaders over them without worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

PARTS = ("train", "val", "test")


class TensorPairs(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and labels held as tensors; a batch is one indexing operation instead of a collation of samples."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        if len(inputs) != len(labels):
            raise ValueError(
                f"one label per input expected, got {len(inputs)} inputs and {len(labels)} labels"
            )
        self.inputs = inputs
        self.labels = labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once (called by the data loader's fetcher)."""
        picked = torch.as_tensor(indices)
        return self.inputs[picked], self.labels[picked]


class EpochShuffle(Sampler[int]):
    """A permutation that depends on the seed and the epoch only, so that a resumed fit sees the same order."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning (and by hand-written loops) before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        yield from torch.randperm(self.n, generator=generator).tolist()


def _as_is(batch: Any) -> Any:
    return batch


class InMemoryDataModule(L.LightningDataModule):
    """Tensors per part, and fast loaders over them without worker processes."""

    input_shape: tuple[int, int, int]
    num_classes = 10

    def __init__(self, batch_size: int, seed: int, shuffle_seed: int | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_seed = shuffle_seed
        self._parts: dict[str, TensorPairs] = {}

    def _make(self) -> dict[str, TensorPairs]:
        raise NotImplementedError("a data module defines how its parts are made")

    def setup(self, stage: str | None = None) -> None:
        """Make all parts once; later calls (validate, test) reuse them."""
        if not self._parts:
            self._parts = self._make()

    def part(self, name: str) -> TensorPairs:
        """The data of one part, made if needed.

        Args:
            name: "train", "val" or "test".

        Raises:
            ValueError: no such part.
        """
        if name not in PARTS:
            raise ValueError(f"name must be one of {PARTS}, got {name!r}")
        self.setup()
        return self._parts[name]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled anew each epoch; an incomplete last batch is left out."""
        data = self.part("train")
        seed = torch.initial_seed() if self.shuffle_seed is None else self.shuffle_seed
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=EpochShuffle(len(data), seed),
            drop_last=len(data) > self.batch_size,
            collate_fn=_as_is,
        )

    def _evaluation_loader(self, name: str) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.part(name), batch_size=max(self.batch_size, 256), collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The whole validation part, in order."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The whole test part, in order."""
        return self._evaluation_loader("test")
