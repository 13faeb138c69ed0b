"""Carry an optimizer over to the compact network: momentum and moments of the kept channels, nothing lost."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from .cuts import cuts_of
from .plan import CompactionPlan


def compact_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, smaller: nn.Module, plan: CompactionPlan
) -> torch.optim.Optimizer:
    """An optimizer for ``smaller`` that goes on where ``optimizer`` is.

    Same class, same parameter groups (learning rates, decay and the rest), and every state tensor of a parameter's shape
    (Adam's moments, SGD's momentum) sliced as the parameter was. Training the compact network then takes the same steps
    as training the masked one, without a jump.

    Args:
        optimizer: the optimizer of ``model``; untouched.
        model: the dense or masked network, the one ``optimizer`` steps.
        smaller: the network that ``plan`` made of it.
        plan: what was removed.

    Raises:
        PlanError: a parameter of ``optimizer`` is not one of ``model``, or ``smaller`` does not have it.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    targets = dict(smaller.named_parameters())
    cuts = cuts_of(plan)

    def counterpart(parameter: Tensor) -> nn.Parameter:
        name = names.get(id(parameter))
        if name is None or name not in targets:
            raise PlanError(
                f"the optimizer steps a parameter of shape {tuple(parameter.shape)} that "
                + ("is not one of model's" if name is None else f"smaller lacks: {name!r}")
            )
        return targets[name]

    def cut(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        value = value.detach().clone()
        piece = cuts.get(names[id(parameter)])
        return piece.narrow_state(value) if piece is not None else value

    result = copy.copy(optimizer)
    # Not an exchanged ``step``, as schedulers leave one behind: it would step the old optimizer.
    result.__dict__ = {name: value for name, value in optimizer.__dict__.items() if name != "step"}
    result.param_groups = [
        {**group, "params": [counterpart(p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    result.state = type(optimizer.state)(optimizer.state.default_factory)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                result.state[counterpart(parameter)] = {
                    key: cut(value, parameter) for key, value in state.items()
                }
    return result
