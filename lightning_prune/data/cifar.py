"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the files their author publishes, binary or python version.

Nothing is downloaded. The python version consists of pickles, which in general can run any code when they are read; these
are read by an unpickler that knows dictionaries, lists, numbers, strings and plain arrays, and refuses everything else.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .modules import InMemoryDataModule, TensorPairs

_SIZE = 32
_PIXELS = 3 * _SIZE * _SIZE

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Layout:
    """One published archive: how its folder and files are called, and where a label is.

    ``label`` is the key of the labels in the python version, the label's byte within a row in the binary one.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    num_classes: int
    label: bytes | int
    label_bytes: int = 0

    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_LAYOUTS = (
    _Layout("cifar-10-batches-py", _BATCHES, "test_batch", 10, b"labels"),
    _Layout("cifar-10-batches-bin", tuple(f"{b}.bin" for b in _BATCHES), "test_batch.bin", 10, 0, 1),
    _Layout("cifar-100-python", ("train",), "test", 100, b"fine_labels"),
    _Layout("cifar-100-binary", ("train.bin",), "test.bin", 100, 1, 2),
)


def _new_array(kind: type, shape: tuple[int, ...], code: bytes) -> npt.NDArray[Any]:
    """Stands in for numpy's ``_reconstruct``: an empty array, whose state the pickle sets next."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"expected a plain array, found {kind!r}")
    return np.ndarray((0,), np.uint8)


class _CifarUnpickler(pickle.Unpickler):
    """Knows what the published files name, and nothing else."""

    _KNOWN: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _new_array,
        ("numpy._core.multiarray", "_reconstruct"): _new_array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """What ``module.name`` stands for, if a published file may name it."""
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no published file does") from None


def _read_pickle(path: Path, layout: _Layout) -> tuple[Any, Any]:
    content = _CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary, found {type(content).__name__}")
    try:
        return content[b"data"], content[layout.label]
    except KeyError as error:
        raise ValueError(f"expected an entry {error.args[0]!r}, found {sorted(content, key=repr)}") from error


def _read_binary(path: Path, layout: _Layout) -> tuple[Any, Any]:
    content = np.frombuffer(path.read_bytes(), np.uint8)
    row = layout.label_bytes + _PIXELS
    if len(content) % row:
        raise ValueError(
            f"expected rows of {row} bytes, found {len(content)} bytes, which is no multiple: is it cut off?"
        )
    rows = content.reshape(-1, row)
    assert isinstance(layout.label, int)
    return rows[:, layout.label_bytes :], rows[:, layout.label]


def _read(path: Path, layout: _Layout) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Pixels, uint8 (n, 3072), and labels, int64 (n,), of one file.

    Raises:
        ValueError: the file is damaged, or is something else; the message names it.
    """
    try:
        read = _read_binary if layout.label_bytes else _read_pickle
        pixels, found = read(path, layout)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2:
            raise ValueError("expected pixels as a matrix of bytes")
        labels = np.asarray(found, np.int64)
        if pixels.shape[1] != _PIXELS or labels.shape != (len(pixels),) or not len(pixels):
            raise ValueError(
                f"expected n x {_PIXELS} pixels and n labels, found {pixels.shape} and {labels.shape}"
            )
        if labels.min() < 0 or labels.max() >= layout.num_classes:
            raise ValueError(
                f"expected labels from 0 to {layout.num_classes - 1}, found {labels.min()} to {labels.max()}"
            )
    except (
        ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError, MemoryError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} is no file of {layout.folder}: {error}") from error
    return pixels, labels


def find_cifar(data_dir: str | os.PathLike[str]) -> tuple[Path, int]:
    """Where the files are.

    Args:
        data_dir: an unpacked archive's folder (``cifar-10-batches-py``, ``cifar-10-batches-bin``, ``cifar-100-python``,
            ``cifar-100-binary``; it may have another name), or the folder that it was unpacked in.

    Returns:
        The folder with the files, and the number of classes.

    Raises:
        FileNotFoundError: no such folder, or files are missing.
        ValueError: there are several data sets; one has to be named.
    """
    found = _find(Path(data_dir))
    return found[0], found[1].num_classes


def _find(root: Path) -> tuple[Path, _Layout]:
    candidates = [(folder, layout) for layout in _LAYOUTS for folder in (root, root / layout.folder)]
    found = [
        (folder, layout)
        for folder, layout in candidates
        if all((folder / f).is_file() for f in layout.files())
    ]
    if not found:
        known = ", ".join(f"{layout.folder} ({', '.join(layout.files())})" for layout in _LAYOUTS)
        partly = [str(f) for f, layout in candidates if any((f / n).is_file() for n in layout.files())]
        state = (
            f"{partly[0]} lacks some of its files" if partly
            else "it holds none of them" if root.is_dir() else "there is no such folder"
        )  # fmt: skip
        raise FileNotFoundError(
            f"data_dir={os.fspath(root)!r} must hold CIFAR in a published layout: {known}; {state}"
        )
    sizes = {layout.num_classes for _, layout in found}
    if len(sizes) > 1:
        raise ValueError(
            f"data_dir={os.fspath(root)!r} holds several data sets, name one of them: "
            + ", ".join(str(folder) for folder, _ in found)
        )
    return found[0]


class CifarDataModule(InMemoryDataModule):
    """CIFAR-10 or CIFAR-100: inputs float32 in [-1, 1] of shape (3, 32, 32), labels int64 (fine ones for CIFAR-100).

    The test part is the published one. No augmentation. All parts are held in memory, 12 kB per image.

    Args:
        data_dir: see :func:`find_cifar`.
        batch_size: training batch; evaluation uses at least 256.
        seed: of the division into training and validation.
        num_train: use only so many training images (None: all that are not for validation).
        num_val: training images that are held back for validation.
        shuffle_seed: of the order of training batches; None takes ``torch.initial_seed()``.

    Raises:
        FileNotFoundError: no such folder, or files are missing.
        ValueError: several data sets, sizes that do not fit; when the data are read: a file is damaged.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        batch_size: int = 64,
        seed: int = 0,
        num_train: int | None = None,
        num_val: int = 5000,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, shuffle_seed)
        if num_val < 0 or (num_train is not None and num_train < 1):
            raise ValueError(
                f"num_train must be positive or None and num_val not negative, got num_train={num_train}, num_val={num_val}"
            )
        self.folder, self._layout = _find(Path(data_dir))
        self.num_classes = self._layout.num_classes
        self.input_shape = (3, _SIZE, _SIZE)
        self.num_train, self.num_val = num_train, num_val

    def _pairs(self, files: tuple[str, ...]) -> tuple[Bytes, npt.NDArray[np.int64]]:
        parts = [_read(self.folder / name, self._layout) for name in files]
        return np.concatenate([p for p, _ in parts]), np.concatenate([labels for _, labels in parts])

    def _make(self) -> dict[str, TensorPairs]:
        pixels, labels = self._pairs(self._layout.train)
        wanted = len(labels) - self.num_val if self.num_train is None else self.num_train
        if wanted < 1 or wanted + self.num_val > len(labels):
            raise ValueError(
                f"num_train={self.num_train} and num_val={self.num_val} do not fit: {self.folder} has {len(labels)} "
                "training images"
            )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed)).numpy()
        train, val = order[self.num_val : self.num_val + wanted], order[: self.num_val]
        test_pixels, test_labels = self._pairs((self._layout.test,))
        return {
            "train": TensorPairs(_inputs(pixels[train]), torch.from_numpy(labels[train])),
            "val": TensorPairs(_inputs(pixels[val]), torch.from_numpy(labels[val])),
            "test": TensorPairs(_inputs(test_pixels), torch.from_numpy(test_labels)),
        }


def _inputs(pixels: Bytes) -> Tensor:
    """Planes of red, green and blue, row by row, as float32 in [-1, 1], shape (n, 3, 32, 32)."""
    return torch.from_numpy(pixels.astype(np.float32)).div_(127.5).sub_(1).view(-1, 3, _SIZE, _SIZE)
