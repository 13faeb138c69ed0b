"""Gradients of compiled operators that can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable(
    compute: Callable[..., Tensor], tensors: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``compute(*tensors)``, made of torch's functions, which have derivatives themselves.

    Args:
        compute: what the operator computes, by torch's functions.
        tensors: its arguments, None for those that there are not.
        needs: which of them have gradients; the others get None.
        grad: gradient of the result.
    """
    # Aliases, because one tensor may come from another, or from the same parameters.
    aliases: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
    leaves = [t for t, need in zip(aliases, needs, strict=True) if need]
    derived = iter(torch.autograd.grad(compute(*aliases), leaves, grad, create_graph=True))
    return tuple(next(derived) if need else None for need in needs)
