"""Data for demonstrations, experiments and tests: handwritten digits, plain and in clutter; CIFAR where it is on disk."""

from .cifar import CifarDataModule
from .digits import (
    ClutteredDigitsDataModule,
    DigitsDataModule,
    cluttered_canvases,
    load_scans,
    split_scans,
)
from .modules import PARTS, EpochShuffle, InMemoryDataModule, TensorPairs

__all__ = [
    "PARTS", "CifarDataModule", "ClutteredDigitsDataModule", "DigitsDataModule", "EpochShuffle", "InMemoryDataModule",
    "TensorPairs", "cluttered_canvases", "load_scans", "split_scans",
]  # fmt: skip
