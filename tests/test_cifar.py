"""CIFAR in its published layouts: small files that these tests write as Python 2 and its author's program did."""

from __future__ import annotations

import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_prune.data import CifarDataModule
from lightning_prune.data.cifar import find_cifar

LAYOUTS = ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]
ROWS = 7  # per file


class Python2Pickler(pickle._Pickler):  # the pure Python one: its opcodes can be chosen
    """Writes what cPickle of Python 2 wrote: byte strings as BINSTRING, numpy's names of that time."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: Any) -> None:
        content = value.encode("latin1") if isinstance(value, str) else bytes(value)
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch[bytes] = save_string
    dispatch[str] = save_string

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or value.__name__}\n".encode())

    dispatch[type] = save_global

    def save_pers(self, pid: Any) -> None:
        raise AssertionError("not used")


def python2_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def draw(seed: int, classes: int, n: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, classes, n)


def write_file(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """One file in the layout that its folder's name says."""
    if path.parent.name == "cifar-10-batches-bin":
        content = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))
    elif path.parent.name == "cifar-100-binary":  # coarse label first
        content = b"".join(
            bytes([label // 5, label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True)
        )
    else:
        fine = [int(label) for label in labels]
        names = {"filenames": [f"{i}.png" for i in range(len(fine))], "batch_label": "a batch"}
        own = (
            {"labels": fine}
            if path.parent.name == "cifar-10-batches-py"
            else {"fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}
        )
        content = python2_pickle({"data": pixels, **own, **names})
    path.write_bytes(content)


def write(root: Path, layout: str) -> tuple[Path, list[tuple[np.ndarray, np.ndarray]]]:
    """A whole archive; returns its folder and what is in its files, the test file last."""
    folder = root / layout
    folder.mkdir(parents=True)
    suffix = ".bin" if "bin" in layout else ""
    train = [f"data_batch_{i}{suffix}" for i in range(1, 6)] if "10-" in layout else [f"train{suffix}"]
    test = f"test_batch{suffix}" if "10-" in layout else f"test{suffix}"
    parts = []
    for number, name in enumerate([*train, test]):
        parts.append(draw(number, 10 if "10-" in layout else 100))
        write_file(folder / name, *parts[-1])
    return folder, parts


def expected(pixels: np.ndarray) -> torch.Tensor:
    """Pixel by pixel, from the description of the format: planes of 1024, each row by row."""
    out = np.empty((len(pixels), 3, 32, 32), np.float64)
    for channel in range(3):
        for row in range(32):
            start = 1024 * channel + 32 * row
            out[:, channel, row] = pixels[:, start : start + 32] / 255 * 2 - 1
    return torch.from_numpy(out)


def rows_of(data: CifarDataModule, *names: str) -> set[tuple[bytes, int]]:
    pairs = [data.part(name) for name in names]
    return {
        ((x * 127.5 + 127.5).round().byte().numpy().tobytes(), int(y))
        for pair in pairs
        for x, y in zip(pair.inputs, pair.labels, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inside", [True, False], ids=["folder", "its parent"])
def test_every_image_arrives_where_it_belongs(tmp_path: Path, layout: str, inside: bool) -> None:
    folder, parts = write(tmp_path, layout)
    data = CifarDataModule(folder if inside else tmp_path, batch_size=3, num_val=4, seed=1)
    assert data.num_classes == (10 if "10-" in layout else 100)
    assert data.input_shape == (3, 32, 32)
    test = data.part("test")
    assert torch.allclose(test.inputs.double(), expected(parts[-1][0]), atol=1e-6)
    assert test.labels.tolist() == parts[-1][1].tolist()
    train = {
        (row.tobytes(), int(label))
        for pixels, labels in parts[:-1]
        for row, label in zip(pixels, labels, strict=True)
    }
    assert rows_of(data, "train", "val") == train
    assert len(data.part("val")) == 4
    assert len(data.part("train")) == len(train) - 4
    inputs, labels = next(iter(data.train_dataloader()))
    assert (inputs.shape, inputs.dtype, labels.dtype) == ((3, 3, 32, 32), torch.float32, torch.int64)


def test_the_division_depends_on_the_seed_alone(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "cifar-100-binary")
    first, again, other = (CifarDataModule(folder, num_val=2, seed=s).part("train").inputs for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    few = CifarDataModule(folder, num_val=2, num_train=3)
    assert rows_of(few, "train") < rows_of(CifarDataModule(folder, num_val=2), "train")
    assert len(few.part("train")) == 3


def test_several_data_sets_in_one_folder_have_to_be_named(tmp_path: Path) -> None:
    write(tmp_path, "cifar-10-batches-bin")
    write(tmp_path, "cifar-10-batches-py")
    assert find_cifar(tmp_path)[1] == 10  # the same data twice
    write(tmp_path, "cifar-100-python")
    with pytest.raises(ValueError, match="holds several data sets"):
        find_cifar(tmp_path)
    assert find_cifar(tmp_path / "cifar-100-python")[1] == 100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_files_are_named(tmp_path: Path, layout: str) -> None:
    folder, _ = write(tmp_path, layout)
    next(path for path in sorted(folder.iterdir()) if "test" in path.name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{layout} lacks some of its files"):
        CifarDataModule(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        CifarDataModule(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds none of them"):
        CifarDataModule(tmp_path / "empty")


@pytest.mark.parametrize("layout", LAYOUTS)
@given(cut=st.floats(0, 0.999))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, layout: str, cut: float) -> None:
    folder = tmp_path / layout
    if not folder.exists():
        write(tmp_path, layout)
    name = next(path for path in sorted(folder.iterdir()) if "test" in path.name)
    pixels, labels = draw(5, 10)
    write_file(name, pixels, labels)
    whole = name.read_bytes()
    keep = int(cut * len(whole))
    row = len(whole) // ROWS
    if "bin" in layout and keep % row == 0 and keep:
        keep += 1  # whole rows are a valid, smaller file
    name.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=f"{name.name} is no file of {layout}"):
        CifarDataModule(folder, num_val=0).part("test")


class Evil:
    """What a pickle can do: run a command when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["data", "labels", "filenames"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    folder, _ = write(tmp_path, "cifar-10-batches-py")
    pixels, labels = draw(0, 10)
    content: dict[str, Any] = {"data": pixels, "labels": labels.tolist(), "filenames": []}
    content[place] = Evil(tmp_path / "executed")
    for protocol in (0, 2, 4):
        (folder / "data_batch_3").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(ValueError, match=r"data_batch_3 is no file of .*no published file does"):
            CifarDataModule(folder, num_val=0).part("train")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(content))  # the trap is real
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary"),
        ({"labels": [1]}, "expected an entry b'data'"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "expected an entry b'labels'"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "matrix of bytes"),
        ({"data": np.zeros((1, 3000), np.uint8), "labels": [1]}, "n x 3072 pixels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "n labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "labels from 0 to 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["dog"]}, "invalid literal"),
        ({"data": "text", "labels": [1]}, "matrix of bytes"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    folder, _ = write(tmp_path, "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(python2_pickle(content))
    with pytest.raises(ValueError, match=f"test_batch is no file of cifar-10-batches-py: .*{message}"):
        CifarDataModule(folder, num_val=0).part("test")


def test_labels_of_another_data_set_are_refused(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "cifar-10-batches-bin")
    write_file(folder / "test_batch.bin", draw(0, 10)[0], np.full(ROWS, 77))
    with pytest.raises(ValueError, match="labels from 0 to 9, found 77"):
        CifarDataModule(folder, num_val=0).part("test")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_val": 35}, "do not fit"),
        ({"num_val": 30, "num_train": 6}, "do not fit"),
        ({"num_val": -1}, "not negative"),
        ({"num_train": 0}, "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, sizes: dict, message: str) -> None:
    folder, _ = write(tmp_path, "cifar-10-batches-bin")  # 5 x 7 training images
    with pytest.raises(ValueError, match=message):
        CifarDataModule(folder, **sizes).part("train")
