"""Fresh batch norm statistics for a network whose channels are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .channels.trace import undisturbed
from .inputs import call_model, floating_dtype, to_model

#: batches of ``recalibrate=True``
BATCHES = 8


def check_recalibrate(value: bool | int) -> None:
    """Raise ValueError unless ``value`` is a bool or a number of batches."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(
            f"recalibrate must be True, False or a number of training batches of at least 0; got {value!r}"
        )


def wanted_batches(value: bool | int) -> int:
    """Number of batches that ``recalibrate=`` asks for."""
    return BATCHES if value is True else int(value)


@torch.no_grad()
def recalibrate(
    model: nn.Module, data: Iterable[Any], reduce: Callable[[Tensor], Tensor] | None = None
) -> list[str]:
    """Re-estimate the running statistics of every batch norm on ``data``, in place.

    With the network as it is now, each batch is normalised by its own statistics; running mean and variance become the
    plain averages over the batches of the batch means and (unbiased) batch variances, as ``momentum=None`` defines them.
    Everything but batch norm is in evaluation mode (no dropout: statistics are for inference). Norms without running
    statistics or that no batch reaches keep what they have.

    Args:
        model: only ``running_mean``, ``running_var`` and ``num_batches_tracked`` change.
        data: batches as ``forward`` takes them (a tensor, positional arguments or a dict of keyword arguments).
        reduce: averages a tensor over the ranks of a distributed run, which all call this with as many batches.

    Returns:
        Names of the norms that were recalibrated.

    Raises:
        ValueError: ``data`` is empty.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    batches = list(data)
    if not batches:
        raise ValueError("data must hold at least one batch to recalibrate on; got none")
    momenta = {name: norm.momentum for name, norm in norms.items()}
    found: dict[str, dict[str, Tensor]] = {}
    with undisturbed(model):  # puts back every buffer, training flag and random state
        try:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for batch in batches:
                call_model(model, to_model(batch, model, floating_dtype(model)))
        finally:
            for name, norm in norms.items():
                norm.momentum = momenta[name]
        for name, norm in norms.items():
            if norm.num_batches_tracked is not None and int(norm.num_batches_tracked) > 0:
                found[name] = {
                    key: buffer.detach().clone() for key, buffer in norm.named_buffers(recurse=False)
                }
    for name, statistics in found.items():
        for key, buffer in norms[name].named_buffers(recurse=False):
            fresh = statistics[key]
            buffer.copy_(reduce(fresh) if reduce is not None and fresh.is_floating_point() else fresh)
    return list(found)
