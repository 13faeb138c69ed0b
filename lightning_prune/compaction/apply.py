"""Carry a plan out on a copy of a model: slice its tensors, or zero the same positions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..channels.trace import named_tensors
from ..inputs import ExampleInputs
from .branches import remove_empty_layers
from .formats import laid_out, memory_format_of
from .plan import CompactionPlan, TensorSlice
from .rules import refresh_attributes
from .sizes import install

#: running variances stay: a zero variance means nothing to a channel whose output is zero anyway
_KEEP = ("running_var",)
#: what Lightning replaces in a compiled LightningModule
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def clone_model(model: nn.Module) -> nn.Module:
    """Deep copy; a LightningModule's copy is detached from its Trainer (which would be copied along otherwise).

    ``torch.compile(lightning_module)`` puts compiled methods, bound to the original, into its ``__dict__``: a copy must
    not call them.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for attribute in ("_trainer", "_fabric"):
            attached = module.__dict__.get(attribute)
            if attached is not None:
                memo[id(attached)] = None
        if module.__dict__.get("_compiler_ctx") is not None:
            for attribute in ("_compiler_ctx", *_COMPILED):
                memo[id(module.__dict__.get(attribute))] = None
    result = copy.deepcopy(model, memo)
    for module in result.modules():
        for method in _COMPILED:
            if module.__dict__.get(method, module) is None:
                del module.__dict__[method]
    return result


def _replace(model: nn.Module, changes: dict[str, Tensor]) -> None:
    """Put new tensors in place of old ones everywhere they are registered (tied tensors stay tied)."""
    current = named_tensors(model)
    by_id = {id(current[name]): new for name, new in changes.items()}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) in by_id:
                    table[key] = by_id[id(tensor)]  # type: ignore[assignment]


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _edited(
    model: nn.Module, plan: CompactionPlan, edit: Callable[[Tensor, TensorSlice], Tensor]
) -> nn.Module:
    tensors = named_tensors(model)
    plan.check_model({name: tuple(t.shape) for name, t in tensors.items()})
    result = clone_model(model)
    tensors = named_tensors(result)
    changed: dict[str, Tensor] = {}
    for piece in plan.slices:
        changed[piece.tensor] = edit(changed.get(piece.tensor, tensors[piece.tensor]).detach(), piece)
    _replace(result, {name: _like(tensors[name], data) for name, data in changed.items()})
    return result


def _is_direction(plan: CompactionPlan, piece: TensorSlice) -> bool:
    """Is this the direction of a weight-normalised filter? Its magnitude is zeroed instead: zero has no direction."""
    for direction, magnitude in (("original1", "original0"), ("weight_v", "weight_g")):
        if piece.tensor.endswith(direction):
            other = plan.tensors.get(piece.tensor.removesuffix(direction) + magnitude, ())
            return len(other) > piece.dim and other[piece.dim] == piece.size
    return False


def zeroed_slices(plan: CompactionPlan) -> list[TensorSlice]:
    """What has to be zero for the removed channels to be exactly zero: all slices but running variances and directions."""
    return [p for p in plan.slices if not p.tensor.endswith(_KEEP) and not _is_direction(plan, p)]


def apply_plan(model: nn.Module, plan: CompactionPlan) -> nn.Module:
    """A smaller copy of ``model``; ``model`` is untouched. Does not check that it computes the same: see ``compact``.

    Raises:
        PlanError: ``plan`` was made for another model.
    """

    def cut(tensor: Tensor, piece: TensorSlice) -> Tensor:
        keep = torch.ones(piece.size, dtype=torch.bool)
        keep[list(piece.removed)] = False
        index = keep.nonzero().squeeze(1).to(tensor.device)
        return laid_out(tensor.index_select(piece.dim, index), memory_format_of(tensor))

    result = _edited(model, plan, cut)
    for module in result.modules():
        refresh_attributes(module)
    if any(len(g.removed) == g.size for g in plan.groups.values()):
        remove_empty_layers(result)
    install(result, plan.sizes)
    return result


def mask_channels(model: nn.Module, example_inputs: ExampleInputs | None, plan: CompactionPlan) -> nn.Module:
    """A copy of ``model`` of the old size whose removed channels are exactly zero.

    Every parameter and buffer position that belongs to a removed channel is set to zero: producers and norms emit zero,
    consumers ignore the channel whatever activation lies between. ``example_inputs`` is accepted for symmetry with
    :func:`compact` and not needed.

    Raises:
        PlanError: ``plan`` was made for another model.
    """
    zeroed = set(zeroed_slices(plan))

    def zero(tensor: Tensor, piece: TensorSlice) -> Tensor:
        if piece not in zeroed:
            return tensor
        return tensor.index_fill(piece.dim, torch.tensor(piece.removed, device=tensor.device), 0)

    return _edited(model, plan, zero)
