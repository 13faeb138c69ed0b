"""Pure-torch definition of ``masked_batch_norm_act`` and its gradients: yardstick and fallback."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.ops.reference import activation_function, check_index

_aten = torch.ops.aten
# (gradient of the output, value before the activation, output) -> gradient of the value before the activation.
_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda g, z, y: g,
    "relu": lambda g, z, y: _aten.threshold_backward(g, y, 0),
    "relu6": lambda g, z, y: _aten.hardtanh_backward(g, z, 0, 6),
    "silu": lambda g, z, y: _aten.silu_backward(g, z),
    "hardswish": lambda g, z, y: _aten.hardswish_backward(g, z),
    "gelu": lambda g, z, y: _aten.gelu_backward(g, z),
    "sigmoid": lambda g, z, y: _aten.sigmoid_backward(g, y),
}


def _column(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def vector_dtype(x: Tensor) -> torch.dtype:
    """Of statistics and parameters: float32 for maps of half types, else that of the map."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _picked(vector: Tensor | None, live: Tensor) -> Tensor | None:
    return None if vector is None else vector.index_select(0, live)


def _alive(live: Tensor | None, x: Tensor) -> Tensor:
    """Ones of the live channels, bool of shape (C, 1, 1)."""
    mask = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    if live is not None:
        check_index("live", live, x.shape[1], is_sorted=True)
        mask = torch.zeros_like(mask).index_fill(0, live, True)
    return _column(mask)


def _before_activation(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mean: Tensor,
    var: Tensor,
    alive: Tensor,
    eps: float,
) -> Tensor:
    z = (x - _column(mean)) * _column((var + eps).rsqrt())
    if weight is not None:
        z = z * _column(weight)
    if bias is not None:
        z = z + _column(bias)
    if gate is not None:
        z = z * _column(gate)
    z = torch.where(alive, z, z.new_zeros(()))
    return z if residual is None else z + residual


def masked_batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    live: Tensor | None,
    eps: float,
    activation: str,
    compact_of: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of the operator: output, and the mean and biased variance that were used, shape (C,) each.

    ``mean`` and ``var`` are taken from ``x`` where they are None; those of dead channels are then zero. Differentiable to
    any order by torch itself. With ``compact_of`` the maps hold the ``live`` channels of so many, all of which are in the
    vectors. Maps of half types are computed in float32 and rounded once; vectors are then float32.
    """
    if vector_dtype(x) != x.dtype:
        wide = (x.float(), None if residual is None else residual.float())
        y, *moments = masked_batch_norm_act(
            *wide, weight, bias, gate, mean, var, live, eps, activation, compact_of
        )
        return y.to(x.dtype), *moments  # type: ignore[return-value]
    if compact_of:
        assert live is not None
        weight, bias, gate, mean, var = (_picked(v, live) for v in (weight, bias, gate, mean, var))
        y, *moments = masked_batch_norm_act(x, residual, weight, bias, gate, mean, var, None, eps, activation)
        used_mean, used_var = (m.new_zeros(compact_of).index_copy(0, live, m) for m in moments)
        return y, used_mean, used_var
    function = activation_function(activation)
    alive = _alive(live, x)
    x = torch.where(alive, x, x.new_zeros(()))
    if mean is None or var is None:
        used_var, used_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    else:
        used_mean, used_var = mean.clone(), var.clone()
    y = function(_before_activation(x, residual, weight, bias, gate, used_mean, used_var, alive, eps))
    return y, used_mean, used_var


def masked_batch_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    mean: Tensor,
    var: Tensor,
    live: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    need_x: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
    need_gate: bool,
    compact_of: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight, bias and gate in closed form; empty where not needed."""
    if vector_dtype(x) != x.dtype:
        wide_residual = None if residual is None else residual.float()
        maps_and_vectors = masked_batch_norm_act_backward(
            grad_y.float(), x.float(), wide_residual, weight, bias, gate, mean, var, live, training, eps,
            activation, need_x, need_residual, need_weight, need_bias, need_gate, compact_of,
        )  # fmt: skip
        maps = (grad.to(x.dtype) for grad in maps_and_vectors[:2])
        return *maps, *maps_and_vectors[2:]  # type: ignore[return-value]
    if compact_of:
        assert live is not None
        weight, bias, gate = (_picked(v, live) for v in (weight, bias, gate))
        grad_x, grad_residual, *grads = masked_batch_norm_act_backward(
            grad_y, x, residual, weight, bias, gate, mean.index_select(0, live), var.index_select(0, live), None,
            training, eps, activation, need_x, need_residual, need_weight, need_bias, need_gate,
        )  # fmt: skip
        full = (g.new_zeros(compact_of).index_copy(0, live, g) if g.numel() else g for g in grads)
        return grad_x, grad_residual, *full  # type: ignore[return-value]
    alive = _alive(live, x)
    zero = x.new_zeros(())
    x = torch.where(alive, x, zero)
    z = _before_activation(x, residual, weight, bias, gate, mean, var, alive, eps)
    g = _GRADIENTS[activation](grad_y, z, activation_function(activation)(z))
    live_g = torch.where(alive, g, zero)
    rstd = (var + eps).rsqrt()
    normed = (x - _column(mean)) * _column(rstd)
    total, moment = live_g.sum((0, 2, 3)), (live_g * normed).sum((0, 2, 3))
    ones = torch.ones_like(rstd)
    gates, weights = (ones if gate is None else gate), (ones if weight is None else weight)
    count = max(x.numel() // max(x.shape[1], 1), 1)
    grad_x = live_g
    if training:
        grad_x = grad_x - _column(total / count) - normed * _column(moment / count)
    grad_x = torch.where(alive, _column(gates * weights * rstd) * grad_x, zero)
    grad_gate = weights * moment + (total * bias if bias is not None else 0)
    found = (grad_x, g, gates * moment, gates * total, grad_gate)
    needs = (need_x, need_residual, need_weight, need_bias, need_gate)
    empty = (x.new_empty((0, 0, 0, 0)), x.new_empty((0, 0, 0, 0)), *(x.new_empty((0,)) for _ in range(3)))
    return tuple(f if need else e for f, need, e in zip(found, needs, empty, strict=True))  # type: ignore[return-value]
