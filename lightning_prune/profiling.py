"""Parameters, multiply-accumulates and activation bytes of a model, in total and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .inputs import ExampleInputs, call_model
from .latency import evaluating
from .ops.availability import extension_available
from .report import to_text


@dataclass(frozen=True)
class LayerProfile:
    """One leaf module (a module with parameters of its own counts as a leaf).

    Attributes:
        name: qualified name in the model.
        type: class name.
        params: parameters registered directly in it; a tensor shared by several modules counts at the first.
        macs: multiply-accumulates of all its calls.
        output_shape: of the first tensor of its last output; empty if it was never called.
        activation_bytes: of its outputs, all calls together.
        calls: how often it ran.
    """

    name: str
    type: str
    params: int
    macs: int
    output_shape: tuple[int, ...]
    activation_bytes: int
    calls: int


@dataclass(frozen=True)
class Profile:
    """What one forward pass costs, batch included.

    Attributes:
        params: number of parameters, shared ones once.
        macs: multiply-accumulates of matrix products and convolutions (half of the flops that torch counts).
        activation_bytes: of the outputs of all leaf modules, a tensor that several of them return (``Identity``,
            in-place ReLU) once.
        layers: leaf modules in the order of the model.
    """

    params: int
    macs: int
    activation_bytes: int
    layers: tuple[LayerProfile, ...]

    def table(self) -> str:
        """Text, one row per layer and the totals below."""
        table = Table(title="Profile", show_footer=True)
        table.add_column("layer", footer="total")
        table.add_column("type")
        table.add_column("output")
        table.add_column("params", justify="right", footer=f"{self.params:,}")
        table.add_column("MACs", justify="right", footer=f"{self.macs:,}")
        table.add_column("activation bytes", justify="right", footer=f"{self.activation_bytes:,}")
        for layer in self.layers:
            shape = "x".join(map(str, layer.output_shape)) or "not called"
            table.add_row(
                layer.name,
                layer.type,
                shape,
                f"{layer.params:,}",
                f"{layer.macs:,}",
                f"{layer.activation_bytes:,}",
            )
        return to_text(table)


@dataclass
class _Counts:
    macs: int = 0
    activation_bytes: int = 0
    calls: int = 0
    shape: tuple[int, ...] = ()
    before: int = 0


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _compact_flops(
    x: Tensor, packed: Tensor, bias: Any, residual: Any, in_index: Any, out_index: Any, weight_shape: list[int],
    *rest: Any, out_val: Tensor, **named: Any,
) -> int:  # fmt: skip
    return 2 * out_val.shape[0] * math.prod(out_val.shape[2:]) * math.prod(weight_shape)


def _prepared_flops(
    x: Tensor, packed: Tensor, bias: Any, residual: Any, in_index: Any, out_index: Any, settings: list[int],
    *, out_val: Tensor, **named: Any,
) -> int:  # fmt: skip
    return _compact_flops(x, packed, bias, residual, in_index, out_index, settings[:4], out_val=out_val)


def _masked_flops(
    x: Tensor, weight: Tensor, bias: Any, gate: Any, live_in: Tensor | None, live_out: Tensor | None, stride: Any,
    padding: Any, dilation: Any, groups: int, *rest: Any, out_val: Tensor, **named: Any,
) -> int:  # fmt: skip
    ins, outs = _per_group(live_in, x.shape[1], groups), _per_group(live_out, weight.shape[0], groups)
    pairs = sum(i * o for i, o in zip(ins, outs, strict=True))
    return 2 * out_val.shape[0] * math.prod(out_val.shape[2:]) * math.prod(weight.shape[2:]) * pairs


def _per_group(live: Tensor | None, channels: int, groups: int) -> list[int]:
    """How many channels live in each group."""
    size = channels // groups
    return [size] * groups if live is None else torch.bincount(live.cpu() // size, minlength=groups).tolist()


def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """What this package's operators compute, for torch's counter: live channels only."""
    if not extension_available():
        return {}
    for formula in (_compact_flops, _prepared_flops, _masked_flops):
        formula.__dict__["_get_raw"] = True  # torch's mark for tensors as arguments instead of shapes
    own = torch.ops.lightning_prune
    return {
        own.compact_conv2d: _compact_flops,
        own.compact_conv2d_prepared: _prepared_flops,
        own.masked_conv2d: _masked_flops,
    }


def profile(model: nn.Module, example_inputs: ExampleInputs) -> Profile:
    """Count what one forward pass in eval mode costs; nothing of the model changes.

    Args:
        model: any module whose forward runs on the inputs.
        example_inputs: a tensor, a tuple or list of positional arguments or a dict of keyword arguments. The counts
            include the batch: pass batch 1 for numbers per sample.

    Returns:
        Profile: totals, and one entry per leaf module. MACs outside any leaf module (``F.conv2d`` in a forward)
        are in the total and in the module they were called from if that is a leaf.

    """
    leaves = list(_leaves(model))
    counts = {module: _Counts() for _, module in leaves}
    counter = FlopCounterMode(display=False, custom_mapping=_flop_formulas())
    alive: dict[int, Tensor] = {}  # storages seen so far, kept alive so that no address is used twice
    distinct_bytes = 0

    def before(module: nn.Module, _args: Any) -> None:
        counts[module].before = counter.get_total_flops()

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal distinct_bytes
        entry = counts[module]
        entry.calls += 1
        entry.macs += (counter.get_total_flops() - entry.before) // 2
        for number, tensor in enumerate(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            size = tensor.numel() * tensor.element_size()
            entry.activation_bytes += size
            if number == 0:
                entry.shape = tuple(tensor.shape)
            address = tensor.untyped_storage().data_ptr()
            if address not in alive:
                alive[address] = tensor
                distinct_bytes += size

    handles = []
    try:
        for _, module in leaves:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
        with evaluating(model), torch.no_grad(), counter:
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()

    seen: set[int] = set()
    layers = []
    for name, module in leaves:
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        entry = counts[module]
        layers.append(
            LayerProfile(
                name=name or "(model)",
                type=type(module).__name__,
                params=sum(p.numel() for p in own),
                macs=entry.macs,
                output_shape=entry.shape,
                activation_bytes=entry.activation_bytes,
                calls=entry.calls,
            )
        )
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        activation_bytes=distinct_bytes,
        layers=tuple(layers),
    )
