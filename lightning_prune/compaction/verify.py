"""Compaction that proves itself: the smaller network must equal the masked one before anybody gets it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..channels.groups import OutputSlices
from ..channels.trace import module_stack, tensors_in, undisturbed
from ..errors import CompactionError
from ..inputs import ExampleInputs, call_model, to_model
from .apply import apply_plan, clone_model, mask_channels
from .plan import CompactionPlan

#: largest allowed difference over the largest output: rounding only. Removing zeros reorders float sums, so float32 is
#: allowed some ulps times the depth; in float64 the same reordering stays far under 1e-9.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def compact(model: nn.Module, example_inputs: ExampleInputs, plan: CompactionPlan) -> nn.Module:
    """A physically smaller copy of ``model``, proven equal to ``mask_channels(model, example_inputs, plan)``.

    Both networks run on ``example_inputs`` in evaluation mode, in the model's own dtype and (where it can) in float64.
    ``model`` is untouched; the result has the class of ``model`` and no trace of this package.

    Args:
        model: the dense network the plan was made for (any weights).
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for ``forward``.
        plan: what to remove.

    Raises:
        PlanError: the plan was made for another model.
        CompactionError: the smaller network fails or differs; names the first module that does.
    """
    smaller = apply_plan(model, plan)
    check_equal(model, mask_channels(model, example_inputs, plan), smaller, example_inputs, plan)
    return smaller


def check_equal(
    model: nn.Module,
    masked: nn.Module,
    smaller: nn.Module,
    example_inputs: ExampleInputs,
    plan: CompactionPlan,
) -> float:
    """Raise :class:`CompactionError` unless both networks agree; return the relative error in the model's dtype."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    error = 0.0
    for dtype in dict.fromkeys((own, torch.float64)):
        a, b = (masked, smaller) if dtype == own else (_double(masked), _double(smaller))
        inputs = to_model(example_inputs, a, dtype)
        try:
            expected = _run(a, inputs)
        except Exception:
            if dtype == own:
                raise
            continue  # the model insists on its own dtype
        try:
            found = _run(b, inputs)
        except Exception as failure:
            raise _failed(b, inputs, failure) from failure
        error_here = _difference(expected, found)
        if not error_here <= TOLERANCE.get(dtype, 1e-5):
            raise _differs(model, a, b, inputs, plan, error_here, dtype)
        if dtype == own:
            error = error_here
    return error


def max_relative_error(a: nn.Module, b: nn.Module, example_inputs: ExampleInputs) -> float:
    """``max |a(x) - b(x)| / max |a(x)|`` over all outputs, in evaluation mode. Infinite where shapes differ."""
    inputs = to_model(example_inputs, a)
    return _difference(_run(a, inputs), _run(b, inputs))


def _double(model: nn.Module) -> nn.Module:
    return clone_model(model).double()


def _run(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    with undisturbed(model):
        return [t.detach() for t in tensors_in(call_model(model, inputs))]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    if len(expected) != len(found) or any(x.shape != y.shape for x, y in zip(expected, found, strict=False)):
        return float("inf")
    worst = 0.0
    for x, y in zip(expected, found, strict=True):
        if x.numel() == 0:
            continue
        scale = float(x.double().abs().max()) or 1.0
        worst = (
            max(worst, float((x.double() - y.double()).abs().max()) / scale)
            if torch.isfinite(x).all()
            else float("nan")
        )
    return worst


def _failed(smaller: nn.Module, inputs: ExampleInputs, failure: Exception) -> CompactionError:
    """Run once more with a module stack to say where the smaller network stopped."""
    stopped: list[str] = []
    stack: list[str] = []
    try:
        with undisturbed(smaller), module_stack(smaller, stack, on_error=stopped.append):
            call_model(smaller, inputs)
    except Exception:
        pass
    module = stopped[0] if stopped else ""
    return CompactionError(
        f"the compact network fails in {module or type(smaller).__name__!r}: {type(failure).__name__}: {failure}. "
        "A size is probably hard-coded there; exclude the layers that feed it.",
        module,
    )


def _differs(
    model: nn.Module, masked: nn.Module, smaller: nn.Module, inputs: ExampleInputs, plan: CompactionPlan, error: float,
    dtype: torch.dtype,
) -> CompactionError:  # fmt: skip
    module = first_difference(model, masked, smaller, inputs, plan, TOLERANCE.get(dtype, 1e-5))
    where = f"first in module {module!r}" if module else "in an operation outside its submodules"
    return CompactionError(
        f"the compact network differs from the masked one, {where}: relative error {error:.2g} in "
        f"{str(dtype).removeprefix('torch.')}, allowed {TOLERANCE.get(dtype, 1e-5):.0e}. "
        "Nothing was changed; exclude the layers that feed this module.",
        module,
    )


def first_difference(
    model: nn.Module,
    masked: nn.Module,
    smaller: nn.Module,
    inputs: ExampleInputs,
    plan: CompactionPlan,
    tolerance: float,
) -> str | None:
    """Name of the first module (in order of completion) whose output differs, or None."""
    from ..channels.api import trace_once

    graph = trace_once(model, to_model(inputs, model, next((p.dtype for p in model.parameters()), None)))
    live = plan.mask(graph)
    expected, found = _outputs(masked, inputs), _outputs(smaller, inputs)
    for slices, (name, x), (other, y) in zip(graph.outputs, expected, found, strict=False):
        if name != other or slices.module != name:
            return name
        if _difference([_keep(x, slices, live)], [y]) > tolerance:
            return name
    return None


def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []

    def record(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((name, output.detach().clone()))

    with undisturbed(model), module_stack(model, [], record):
        call_model(model, inputs)
    return seen


def _keep(x: Tensor, slices: OutputSlices, live: Any) -> Tensor:
    for dim, ids in enumerate(slices.dims):
        if ids is not None:
            keep = (ids < 0) | live[ids]
            x = x[(slice(None),) * dim + (torch.from_numpy(keep).to(x.device),)]
    return x


__all__ = ["check_equal", "compact", "first_difference", "max_relative_error"]
