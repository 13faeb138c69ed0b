"""How labels pass through aten ops, one file per kind of op.

A rule is ``rule(flow, call)``: it reads the labels of the op's tensor arguments, unites or freezes what the op ties
together, and sets the labels of the outputs. Ops are looked up by their overload packet's name (``"aten.cat"``); ops
that aten itself tags as pointwise need no entry. An op without a rule freezes what it touches: unknown is never wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flow import Flow
from . import contraction, factory, movement, norm, pointwise, pooling, reduction, reshape  # noqa: F401
from .registry import Call, Rule, lookup, tensors_of

_VIEWS = {
    f"aten.{name}"
    for name in (
        "t",
        "transpose",
        "permute",
        "view",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
        "_to_copy",
        "expand",
        "clone",
    )
}


def _is_pointwise(call: Call) -> bool:
    """Does aten tag the op, or the plain twin of this in-place op, as pointwise?"""
    plain = getattr(torch.ops.aten, call.name.removeprefix("aten.").removesuffix("_"), None)
    twins = [getattr(plain, name) for name in plain.overloads()] if plain is not None else []
    return any(torch.Tag.pointwise in func.tags for func in (call.func, *twins))


def apply_rule(flow: Flow, call: Call) -> None:
    """Propagate labels through one executed op."""
    found: Rule | None = lookup(call.name)
    if found is None and _is_pointwise(call):
        found = pointwise.pointwise
    if found is not None:
        found(flow, call)
        if call.name in _VIEWS and isinstance(call.out, Tensor):
            flow.inherit(call.out, call.args[0])
        return
    for tensor in tensors_of((call.args, call.kwargs)):
        flow.freeze_tensor(tensor, f"{call.name} has no rule for channels")


__all__ = ["Call", "apply_rule", "tensors_of"]
