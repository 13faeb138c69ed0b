"""Data and networks of the experiments, as functions that worker processes can import."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..data import CifarDataModule, ClutteredDigitsDataModule
from ..models import ArticleNet, resnet20
from .trials import Setting


def cluttered_digits(seed: int, *, samples: int, canvas: int, batch_size: int) -> ClutteredDigitsDataModule:
    """Cluttered digits drawn anew for each seed, digits as large in the canvas as on the usual one of 32 pixels."""
    return ClutteredDigitsDataModule(
        batch_size=batch_size,
        seed=seed,
        num_train=samples,
        num_val=1,
        num_test=2000,
        canvas=canvas,
        digit_size=(20 * canvas / 32, 28 * canvas / 32),
        shuffle_seed=seed,
    )


def cifar(seed: int, *, data_dir: str, samples: int | None, batch_size: int) -> CifarDataModule:
    """CIFAR from ``data_dir``; the seed shuffles (and draws ``samples``), the test part is the published one."""
    return CifarDataModule(
        data_dir, batch_size=batch_size, seed=seed, num_train=samples, num_val=0, shuffle_seed=seed
    )


def _article_net(
    shape: tuple[int, int, int], num_classes: int, *, widths: Sequence[int], batch_norm: bool
) -> nn.Module:
    return ArticleNet(shape[0], shape[1], widths, num_classes, batch_norm=batch_norm)


def _resnet20(shape: tuple[int, int, int], num_classes: int, *, width: int) -> nn.Module:
    return resnet20(num_classes, shape[0], width)


def article_settings(
    make_data: Any, describe: dict[str, Any], widths: Sequence[int], **training: Any
) -> dict[str, Setting]:
    """The article's network, and its twin with batch norms for the method that needs them.

    Args:
        make_data: data module of a seed.
        describe: sizes of the data.
        widths: of :class:`~lightning_prune.models.ArticleNet`.
        training: further arguments of :class:`Setting`.
    """
    plain = Setting(
        "article",
        make_data,
        functools.partial(_article_net, widths=tuple(widths), batch_norm=False),
        describe={**describe, "widths": list(widths)},
        with_norms="article+bn",
        **training,
    )
    normed = replace(
        plain,
        name="article+bn",
        make_net=functools.partial(_article_net, widths=tuple(widths), batch_norm=True),
        with_norms="",
        shown_as="article",
    )
    return {plain.name: plain, normed.name: normed}


def resnet20_setting(
    make_data: Any, describe: dict[str, Any], width: int, **training: Any
) -> dict[str, Setting]:
    """The CIFAR-style ResNet-20, residual streams pruned too (else one tenth of the MACs is out of reach).

    Args:
        make_data: data module of a seed.
        describe: sizes of the data.
        width: channels of the first stage.
        training: further arguments of :class:`Setting`.
    """
    pruning = {"prune_streams": True, **training.pop("pruning", {})}
    setting = Setting(
        "resnet20",
        make_data,
        functools.partial(_resnet20, width=width),
        pruning=pruning,
        describe={**describe, "width": width},
        **training,
    )
    return {setting.name: setting}
