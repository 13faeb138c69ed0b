"""Example inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import TraceError

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


def call_model(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call ``model`` with ``example_inputs``."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def map_inputs(example_inputs: ExampleInputs, function: Callable[[Tensor], Tensor]) -> ExampleInputs:
    """Apply ``function`` to every tensor in the inputs."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, example_inputs)


def to_model(
    example_inputs: ExampleInputs, model: nn.Module, dtype: torch.dtype | None = None
) -> ExampleInputs:
    """Move inputs to the model's device; floating-point ones also to ``dtype``."""
    first = next((p for p in model.parameters()), None)
    device = first.device if first is not None else torch.device("cpu")

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype if dtype is not None and tensor.is_floating_point() else None)

    return map_inputs(example_inputs, move)


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """Of the first floating-point parameter; None if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def first_rows(example_inputs: ExampleInputs, rows: int) -> ExampleInputs:
    """At most ``rows`` samples of every tensor that shares the first tensor's batch size."""
    batch = batch_size(example_inputs)
    return map_inputs(example_inputs, lambda t: t[:rows] if t.dim() and t.shape[0] == batch else t)


def without_labels(batch: Any) -> ExampleInputs:
    """The inputs of a batch of data: of a pair, the first; anything else is inputs as it is."""
    inputs: ExampleInputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
    return inputs


def batch_size(example_inputs: ExampleInputs) -> int:
    """Size of dimension 0 of the first tensor (1 when there is none)."""
    for leaf in tree_leaves(example_inputs):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return max(1, int(leaf.shape[0]))
    return 1


def describe(example_inputs: ExampleInputs) -> str:
    """Shapes and dtypes, for messages."""
    leaves = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    return (
        ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in leaves) or "no tensors"
    )


def describe_failure(
    model: nn.Module, example_inputs: ExampleInputs, error: Exception, failed: Sequence[str] = ()
) -> TraceError:
    """A :class:`TraceError` that says what was fed and where it stopped (``failed``: modules, innermost first)."""
    where = f" in {failed[0]!r}" if failed and failed[0] else ""
    return TraceError(
        f"{type(model).__name__}.forward failed{where} on the example input ({describe(example_inputs)}): "
        f"{type(error).__name__}: {error}\n"
        "Pass example_inputs= that forward accepts: a tensor, a tuple of positional or a dict of keyword arguments."
    )
