"""Fresh weights for a given architecture: the from-scratch baseline, and the cure for symmetric initialisation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .compaction import CompactionPlan, apply_plan

Init = Literal["he_normal", "glorot_uniform", "gaussian"]
INITS: tuple[str, ...] = ("he_normal", "glorot_uniform", "gaussian")


def reinitialise(
    model: nn.Module, init: Init = "he_normal", *, std: float = 0.01, seed: int = 0
) -> nn.Module:
    """Draw new weights for every layer of ``model``, in place, from the fans it has now.

    Convolutions and linear layers get ``init`` and zero biases; every other module that has one runs its own
    ``reset_parameters`` (norms: scale 1, shift 0, fresh statistics).

    Args:
        model: changed in place.
        init: ``"he_normal"``: variance 2 / fan_in (He et al. 2015). ``"glorot_uniform"``: variance 2 / (fan_in + fan_out)
            (Glorot and Bengio 2010). ``"gaussian"``: standard deviation ``std``.
        std: of ``"gaussian"``.
        seed: the draw is reproducible and leaves the global random state alone.

    Returns:
        ``model``.

    Raises:
        ValueError: unknown ``init`` or a negative ``std``.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if std < 0:
        raise ValueError(f"std must not be negative; got {std!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                if init == "he_normal":
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                elif init == "glorot_uniform":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, 0.0, std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            else:
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
    return model


def from_scratch(
    dense: nn.Module, plan: CompactionPlan, init: Init = "he_normal", *, seed: int = 0
) -> nn.Module:
    """The compact architecture of ``plan`` with fresh weights: the baseline every pruned network has to beat.

    Train it for as many epochs as the pruning fit took ("equal epochs"), or for as much compute as it took ("equal
    compute": more epochs, since each is cheaper; Liu et al. 2019, "Rethinking the Value of Network Pruning").

    Args:
        dense: the dense network, for its structure only.
        plan: what was removed.
        init: see :func:`reinitialise`.
        seed: see :func:`reinitialise`.

    Raises:
        PlanError: ``plan`` was made for another model.
    """
    return reinitialise(apply_plan(dense, plan), init, seed=seed)
