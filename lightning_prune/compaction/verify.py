"""Compaction that proves itself: the smaller network must equal the masked one before anybody gets it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..channels.groups import OutputSlices
from ..channels.trace import module_stack, tensors_in, undisturbed
from ..errors import CompactionError
from ..inputs import ExampleInputs, batch_size, call_model, describe, floating_dtype, map_inputs, to_model
from .apply import apply_plan, clone_model, mask_channels
from .plan import CompactionPlan

#: largest allowed difference over the largest output: rounding only. Removing zeros reorders float sums, which float64
#: shows to stay under 1e-9; a network that amplifies its own rounding errors may then differ by as much as these.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_OWN_ROUNDING = 4.0


def compact(model: nn.Module, example_inputs: ExampleInputs, plan: CompactionPlan) -> nn.Module:
    """A physically smaller copy of ``model``, proven equal to ``mask_channels(model, example_inputs, plan)``.

    Both networks run in evaluation mode on ``example_inputs``, in float64 (where the model can) and in the model's own
    dtype, and on random inputs of another batch size and, where the dense network takes it, another spatial size.
    ``model`` is untouched; the result has the class of ``model``. A module whose code spells sizes out gets a subclass
    of its class that replaces them, see :mod:`lightning_prune.compaction.sizes`.

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
    own = floating_dtype(model) or torch.float32
    exact: list[Tensor] | None = None
    if own != torch.float64:
        twin, small = _double(masked), _double(smaller)
        inputs = to_model(example_inputs, twin, torch.float64)
        exact = _accepted(twin, inputs)  # None: the model insists on its own dtype
        if exact is not None:
            _compare(model, twin, small, inputs, plan, exact, TOLERANCE[torch.float64])
    inputs = to_model(example_inputs, masked, own)
    expected = run_quietly(masked, inputs)
    allowed = TOLERANCE.get(own, 1e-5)
    rounding = relative_difference(exact, expected) if exact is not None else 0.0
    error = _compare(model, masked, smaller, inputs, plan, expected, max(allowed, _OWN_ROUNDING * rounding))
    if exact is not None:  # float64 leaves no doubt
        masked, smaller, inputs, allowed = (
            twin,
            small,
            to_model(inputs, twin, torch.float64),
            TOLERANCE[torch.float64],
        )
    for other in other_examples(inputs):
        accepted = _accepted(masked, other)
        if accepted is not None and _per_sample(expected, inputs, accepted, other):
            _compare(model, masked, smaller, other, plan, accepted, 10 * allowed)
            break
    return error


def _compare(
    model: nn.Module,
    masked: nn.Module,
    smaller: nn.Module,
    inputs: ExampleInputs,
    plan: CompactionPlan,
    expected: list[Tensor],
    allowed: float,
) -> float:
    try:
        found = run_quietly(smaller, inputs)
    except Exception as failure:
        raise _failed(smaller, inputs, failure) from failure
    error = relative_difference(expected, found)
    if not error <= allowed:
        raise _differs(model, masked, smaller, inputs, plan, error, allowed)
    return error


def _accepted(model: nn.Module, inputs: ExampleInputs) -> list[Tensor] | None:
    """Outputs, or None where the model refuses these inputs."""
    try:
        return run_quietly(model, inputs)
    except Exception:
        return None


def _per_sample(
    expected: list[Tensor], inputs: ExampleInputs, accepted: list[Tensor], other: ExampleInputs
) -> bool:
    """Do outputs follow the batch size? ``view(-1, 400)`` takes a larger image for several samples."""
    before, after = batch_size(inputs), batch_size(other)
    return len(expected) == len(accepted) and all(
        x.dim() == y.dim() and (not x.dim() or x.shape[0] != before or y.shape[0] == after)
        for x, y in zip(expected, accepted, strict=True)
    )


def other_examples(example_inputs: ExampleInputs) -> Iterator[ExampleInputs]:
    """Random inputs of other sizes: first batch and spatial size changed, then the batch size alone."""
    batch = batch_size(example_inputs)
    generator = torch.Generator().manual_seed(0)

    def resized(tensor: Tensor, spatial: bool) -> Tensor:
        shape = list(tensor.shape)
        if shape and shape[0] == batch:
            shape[0] = 1 if batch > 1 else 2
        if spatial and len(shape) > 2:
            # the leading two are batch and channels; half the size, in steps that common strides divide
            shape[2:] = [n // 2 // 32 * 32 if n >= 128 else n + 32 for n in shape[2:]]
        if not tensor.is_floating_point():
            top = int(tensor.max()) + 1 if tensor.numel() else 1
            return torch.randint(0, max(top, 1), shape, generator=generator).to(tensor)
        values = torch.randn(shape, generator=generator).to(tensor)
        return values * tensor.std(correction=0).clamp_min(1e-3) + tensor.mean() if tensor.numel() else values

    for spatial in (True, False):
        yield map_inputs(example_inputs, lambda tensor, spatial=spatial: resized(tensor, spatial))  # type: ignore[misc]


def max_relative_error(a: nn.Module, b: nn.Module, example_inputs: ExampleInputs) -> float:
    """``max |a(x) - b(x)| / max |a(x)|`` over all outputs, in evaluation mode. Infinite where shapes differ."""
    inputs = to_model(example_inputs, a)
    return relative_difference(run_quietly(a, inputs), run_quietly(b, inputs))


def _double(model: nn.Module) -> nn.Module:
    return clone_model(model).double()


def run_quietly(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """The outputs of ``model`` in evaluation mode; it is as before afterwards."""
    with undisturbed(model):
        return [t.detach() for t in tensors_in(call_model(model, inputs))]


def relative_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """``max |expected - found| / max |expected|``, the worst of all outputs. Infinite where shapes differ."""
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
    allowed: float,
) -> CompactionError:  # fmt: skip
    module = first_difference(model, masked, smaller, inputs, plan, allowed)
    where = f"first in module {module!r}" if module else "in an operation outside its submodules"
    return CompactionError(
        f"the compact network differs from the masked one, {where}: relative error {error:.2g} on "
        f"{describe(inputs)}, allowed {allowed:.0e}. "
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
    # by tensor positions: without a trial the groups may be others than those of the plan
    removed = {(s.tensor, s.dim): s.removed for s in plan.slices}
    live = np.ones(graph.num_channels, bool)
    for group in graph.groups:
        for member in group.members:
            live[group.ids] &= ~np.isin(member.index[:, 0], removed.get((member.tensor, member.dim), ()))
    expected, found = _outputs(masked, inputs), _outputs(smaller, inputs)
    for slices, (name, x), (other, y) in zip(graph.outputs, expected, found, strict=False):
        if name != other or slices.module != name:
            return name
        if relative_difference([_keep(x, slices, live)], [y]) > tolerance:
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
