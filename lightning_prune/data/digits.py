"""Real handwritten digits, as they are and lost in clutter.

Both sets come from the 1,797 scans of 8x8 pixels that scikit-learn ships (a copy of the UCI "Optical Recognition of
Handwritten Digits" test set), so nothing is downloaded. Scans are divided once into training, validation and test
scans, class by class; a canvas of the cluttered set only ever shows scans of its own part, fragments included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .modules import PARTS, InMemoryDataModule, TensorPairs

_SCAN = 8


def load_scans() -> tuple[Tensor, Tensor]:
    """Load the scans of scikit-learn's digits.

    Returns:
        images: float32 in [0, 1], shape (1797, 1, 8, 8), ink is 1.
        labels: int64 in [0, 10), shape (1797,).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits data need scikit-learn, which is not installed; pip install 'lightning-prune[demo]'"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16.0).unsqueeze(1)
    return images, torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def split_scans(labels: Tensor, val: float = 0.15, test: float = 0.25, seed: int = 0) -> dict[str, Tensor]:
    """Divide scans into disjoint parts, class by class, so that every part has the same class shares.

    Args:
        labels: int64, shape (n,).
        val: share of the validation part, in (0, 1).
        test: share of the test part, in (0, 1).
        seed: of the permutation within each class.

    Returns:
        Indices into ``labels`` (int64, sorted) under "train", "val" and "test"; together all of them, none twice.

    Raises:
        ValueError: a share is not positive or nothing is left to train on.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise ValueError(f"val and test must be positive with val + test < 1, got val={val}, test={test}")
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        n_val, n_test = round(len(members) * val), round(len(members) * test)
        parts["val"].append(members[:n_val])
        parts["test"].append(members[n_val : n_val + n_test])
        parts["train"].append(members[n_val + n_test :])
    return {part: torch.cat(indices).sort().values for part, indices in parts.items()}


def _place(glyphs: Tensor, size: Tensor, left: Tensor, top: Tensor, canvas: int) -> Tensor:
    """Draw each glyph on its own empty canvas, bilinearly.

    ``glyphs`` is (n, 1, 8, 8); ``size``, ``left`` and ``top`` are (n,) in canvas pixels: the edge length of the
    drawn glyph and its corner. Returns (n, 1, canvas, canvas).
    """
    pixels = torch.arange(canvas, dtype=torch.float32) + 0.5
    # grid_sample wants [-1, 1] across the source glyph; beyond it, it reads zeros.
    x = ((pixels - left[:, None]) / size[:, None]) * 2 - 1
    y = ((pixels - top[:, None]) / size[:, None]) * 2 - 1
    shape = (len(glyphs), canvas, canvas)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(glyphs, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator) * (high - low) + low


def cluttered_canvases(
    images: Tensor,
    labels: Tensor,
    n: int,
    *,
    canvas: int = 32,
    distractors: int = 4,
    digit_size: tuple[float, float] = (20.0, 28.0),
    fragment: int = 3,
    fragment_brightness: tuple[float, float] = (0.3, 0.7),
    noise: float = 0.04,
    seed: int = 0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Draw coloured canvases with one whole digit each, at a random place and scale, among fragments of other digits.

    The task follows the cluttered digits of Mnih et al., "Recurrent Models of Visual Attention" (2014): the class is
    that of the only complete digit. On top of it come colour (a random bright colour per glyph), a smooth random dark
    background and pixel noise, so that three input channels carry information.

    Args:
        images: scans to draw from, float32 in [0, 1], shape (m, 1, 8, 8).
        labels: int64, shape (m,).
        n: number of canvases.
        canvas: edge length in pixels.
        distractors: fragments per canvas.
        digit_size: smallest and largest edge length of the digit's scan on the canvas, in pixels.
        fragment: edge length of a fragment, in pixels of the scan (1 to 8); it is scaled like a digit.
        fragment_brightness: smallest and largest value of each colour channel of a fragment; the digit's are 0.6 to 1.
        noise: standard deviation of the pixel noise.
        seed: of everything random here; equal arguments give equal canvases.
        chunk: canvases drawn at once (bounds the memory, does not change the scans drawn).

    Returns:
        canvases: float32 in [0, 1], shape (n, 3, canvas, canvas).
        labels: int64, shape (n,).

    Raises:
        ValueError: a size that does not fit.
    """
    low, high = digit_size
    if not 0 < low <= high <= canvas:
        raise ValueError(f"digit_size must satisfy 0 < low <= high <= canvas={canvas}, got {digit_size}")
    if not 1 <= fragment <= _SCAN:
        raise ValueError(f"fragment must be between 1 and {_SCAN} pixels of the scan, got {fragment}")
    if n < 1 or distractors < 0:
        raise ValueError(
            f"n must be positive and distractors not negative, got n={n}, distractors={distractors}"
        )
    if len(images) == 0:
        raise ValueError("images is empty: there is nothing to draw")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (n,), generator=generator)
    out = torch.empty(n, 3, canvas, canvas)
    for start in range(0, n, chunk):
        picked = images[chosen[start : start + chunk]]
        out[start : start + chunk] = _draw(
            picked, images, generator, canvas, distractors, digit_size, fragment, fragment_brightness, noise
        )
    return out, labels[chosen]


def _draw(
    digits: Tensor,
    images: Tensor,
    generator: torch.Generator,
    canvas: int,
    distractors: int,
    digit_size: tuple[float, float],
    fragment: int,
    fragment_brightness: tuple[float, float],
    noise: float,
) -> Tensor:
    n, low, high = len(digits), *digit_size
    coarse = _uniform((n, 3, 3, 3), 0.0, 0.3, generator)
    out = F.interpolate(coarse, size=(canvas, canvas), mode="bilinear", align_corners=True)
    in_scan = torch.arange(_SCAN)
    for layer in range(distractors + 1):
        size = _uniform((n,), low, high, generator)
        if layer < distractors:
            glyphs = images[torch.randint(len(images), (n,), generator=generator)]
            corner = torch.randint(_SCAN - fragment + 1, (n, 2), generator=generator)
            inside = (in_scan >= corner[..., None]) & (in_scan < corner[..., None] + fragment)
            glyphs = glyphs * (inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1)
            # The fragment itself, not the scan around it, lies within the canvas.
            scale = size / _SCAN
            room = canvas - scale * fragment
            left = torch.rand(n, generator=generator) * room - corner[:, 1] * scale
            top = torch.rand(n, generator=generator) * room - corner[:, 0] * scale
        else:  # the digit comes last: nothing covers it
            glyphs = digits
            left = torch.rand(n, generator=generator) * (canvas - size)
            top = torch.rand(n, generator=generator) * (canvas - size)
        ink = _place(glyphs, size, left, top, canvas)
        brightness = fragment_brightness if layer < distractors else (0.6, 1.0)
        colour = _uniform((n, 3, 1, 1), *brightness, generator)
        out = out + ink * (colour - out)
    out += torch.randn(out.shape, generator=generator) * noise
    return out.clamp_(0.0, 1.0)


class DigitsDataModule(InMemoryDataModule):
    """The scans as they are: inputs float32 in [-1, 1] of shape (1, 8, 8), labels int64 in [0, 10).

    Args:
        batch_size: training batch; evaluation uses at least 256.
        seed: of the division into parts.
        num_train: use only the first so many training scans of a seeded order (None: all 1,078).
        shuffle_seed: of the order of training batches; None takes ``torch.initial_seed()``, what ``seed_everything``
            set.
    """

    input_shape = (1, 8, 8)

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        num_train: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, shuffle_seed)
        if num_train is not None and num_train < 1:
            raise ValueError(f"num_train must be positive or None, got {num_train}")
        self.num_train = num_train

    def _make(self) -> dict[str, TensorPairs]:
        images, labels = load_scans()
        parts = split_scans(labels, seed=self.seed)
        if self.num_train is not None:
            train = parts["train"]
            if self.num_train > len(train):
                raise ValueError(
                    f"num_train={self.num_train}, but there are only {len(train)} training scans"
                )
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
            parts["train"] = train[order[: self.num_train]]
        return {part: TensorPairs(images[rows] * 2 - 1, labels[rows]) for part, rows in parts.items()}


class ClutteredDigitsDataModule(InMemoryDataModule):
    """Digits in clutter: inputs float32 in [-1, 1] of shape (3, canvas, canvas), labels int64 in [0, 10).

    Training, validation and test canvases are drawn from separate scans (see :func:`cluttered_canvases`).

    Args:
        batch_size: training batch; evaluation uses at least 256.
        seed: of the division into parts and of the drawing.
        num_train: training canvases.
        num_val: validation canvases.
        num_test: test canvases.
        canvas: edge length in pixels.
        distractors: fragments per canvas.
        digit_size: smallest and largest edge length of a digit's scan on the canvas, in pixels.
        shuffle_seed: of the order of training batches; None takes ``torch.initial_seed()``, what ``seed_everything``
            set.
    """

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        num_train: int = 6000,
        num_val: int = 1000,
        num_test: int = 2000,
        canvas: int = 32,
        distractors: int = 4,
        shuffle_seed: int | None = None,
        digit_size: tuple[float, float] = (20.0, 28.0),
    ) -> None:
        super().__init__(batch_size, seed, shuffle_seed)
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        for part, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"num_{part} must be positive, got {size}")
        self.canvas = canvas
        self.distractors = distractors
        self.digit_size = digit_size
        self.input_shape = (3, canvas, canvas)

    def _make(self) -> dict[str, TensorPairs]:
        images, labels = load_scans()
        made: dict[str, TensorPairs] = {}
        for number, (part, rows) in enumerate(split_scans(labels, seed=self.seed).items()):
            inputs, targets = cluttered_canvases(
                images[rows],
                labels[rows],
                self.sizes[part],
                canvas=self.canvas,
                distractors=self.distractors,
                digit_size=self.digit_size,
                seed=self.seed * len(PARTS) + number,
            )
            made[part] = TensorPairs(inputs.mul_(2).sub_(1), targets)
        return made
