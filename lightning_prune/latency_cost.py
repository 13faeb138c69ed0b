"""Budgets in measured latency: a table per layer and width, and a last word by measuring the compact network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .channels.groups import ChannelGraph
from .channels.trace import undisturbed
from .compaction import CompactionPlan, apply_plan
from .errors import BudgetError
from .inference import cache
from .inputs import ExampleInputs, call_model, to_model
from .latency import compare_latency, measure_latency

Floats = npt.NDArray[np.float64]
#: widths at which a layer is measured, as shares of its channels
_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
_REPEATS = 7


@dataclass(frozen=True)
class LayerTable:
    """Seconds of one layer's call at widths ``ins`` x ``outs``, shape [len(ins), len(outs)], and who its channels are.

    ``in_channels`` / ``out_channels``: channel id of each position, -1 for none.
    """

    module: str
    ins: Floats
    outs: Floats
    seconds: Floats
    in_channels: npt.NDArray[np.int64]
    out_channels: npt.NDArray[np.int64]

    def at(self, inputs: float, outputs: float) -> float:
        """Bilinear interpolation; nothing outside the measured widths is slower or faster than their edge."""
        columns = np.array([np.interp(outputs, self.outs, row) for row in self.seconds])
        return float(np.interp(inputs, self.ins, columns))


class LatencyCost:
    """Predicted seconds of a mask, with the interface of :class:`lightning_prune.CostModel`.

    The sum of the layers' interpolated times, scaled and shifted so that the dense network and one thinned at random to
    half its channels come out as measured: norms, activations and calls between the layers are in scale and shift.

    Args:
        graph: the traced network.
        tables: one per measured layer.
        scale: network seconds per second of the tables.
        shift: seconds that no channel changes.
    """

    metric = "latency"

    def __init__(
        self, graph: ChannelGraph, tables: tuple[LayerTable, ...], scale: float, shift: float
    ) -> None:
        self.num_channels = graph.num_channels
        self.tables, self.scale, self.shift = tables, scale, shift
        self.dense = self.cost(np.ones(graph.num_channels))

    def _sizes(self, table: LayerTable, mask: Floats) -> tuple[float, float]:
        live = np.append(mask, 1.0)
        return float(live[table.in_channels].sum()), float(live[table.out_channels].sum())

    def cost(self, mask: npt.NDArray[np.generic]) -> float:
        """Predicted seconds at ``mask``, boolean or in [0, 1], shape [num_channels]."""
        live = mask.astype(np.float64)
        return self.shift + self.scale * sum(t.at(*self._sizes(t, live)) for t in self.tables)

    def marginal(self, mask: npt.NDArray[np.generic]) -> Floats:
        """Seconds that one more of each channel costs at ``mask``, averaged over the measured interval around it."""
        live = mask.astype(np.float64)
        result = np.zeros(self.num_channels + 1)
        for table in self.tables:
            a, b = self._sizes(table, live)
            step_in, step_out = 0.1 * table.ins[-1], 0.1 * table.outs[-1]
            by_in = (table.at(a + step_in, b) - table.at(a - step_in, b)) / (2 * step_in)
            by_out = (table.at(a, b + step_out) - table.at(a, b - step_out)) / (2 * step_out)
            np.add.at(result, table.in_channels, max(by_in, 0.0) * self.scale)
            np.add.at(result, table.out_channels, max(by_out, 0.0) * self.scale)
        return result[:-1]


def measure_latency_cost(
    model: nn.Module,
    example_inputs: ExampleInputs,
    graph: ChannelGraph,
    progress: Callable[[int, int, str], None] | None = None,
) -> LatencyCost:
    """Measure every convolution and linear layer at several widths on this device, for the example inputs' batch size.

    Times are kept on disk by device, versions and layer (see ``LIGHTNING_PRUNE_CACHE``), so that a second call is quick.

    Args:
        model: untouched.
        example_inputs: their batch and spatial size are what latency means here.
        graph: the traced network.
        progress: called with (layers done, all layers, name of the layer).

    Raises:
        BudgetError: nothing to measure: no layer with prunable channels is a plain convolution or linear layer.
    """
    inputs = to_model(example_inputs, model)
    shapes = _input_shapes(model, inputs)
    tables = []
    layers = [(name, module) for name, module in model.named_modules() if name in shapes]
    for i, (name, module) in enumerate(layers):
        if progress is not None:
            progress(i, len(layers), name)
        prefix = f"{name}." if name else ""
        rows, columns = (graph.positions(f"{prefix}weight", d) for d in (0, 1))
        transposed = isinstance(module, _ConvTransposeNd)
        in_channels, out_channels = (rows, columns) if transposed else (columns, rows)
        if (in_channels >= 0).any() or (out_channels >= 0).any():
            tables.append(_table(name, module, shapes[name], in_channels, out_channels))
    if not tables:
        raise BudgetError(
            "metric='latency' found no convolution or linear layer with prunable channels to measure; use metric='macs'"
        )
    return _calibrated(model, inputs, graph, tuple(tables))


def _input_shapes(model: nn.Module, inputs: ExampleInputs) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):

            def record(_: nn.Module, args: Any, name: str = name) -> None:
                if args and isinstance(args[0], Tensor):
                    shapes.setdefault(name, tuple(args[0].shape))

            handles.append(module.register_forward_pre_hook(record))
    try:
        with undisturbed(model):
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _widths(size: int, prunable: bool, multiple: int) -> list[int]:
    if not prunable:
        return [size]
    return sorted({max(multiple, round(size * share / multiple) * multiple) for share in _SHARES} | {size})


def _table(
    name: str, module: nn.Module, shape: tuple[int, ...], in_channels: npt.NDArray[np.int64],
    out_channels: npt.NDArray[np.int64],
) -> LayerTable:  # fmt: skip
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    assert isinstance(groups, int)
    transposed = isinstance(module, _ConvTransposeNd)
    depthwise = groups > 1 and isinstance(module, _ConvNd) and groups == module.in_channels
    # of a grouped layer `in_channels` holds one group's columns; of a depthwise one nothing varies but the rows
    ins = [len(in_channels)] if depthwise else _widths(len(in_channels), bool((in_channels >= 0).any()), 1)
    outs = _widths(
        len(out_channels), bool((out_channels >= 0).any()), 1 if depthwise or transposed else groups
    )
    key = {
        **cache.environment(weight.device), "kind": "width table", "layer": type(module).__name__, "shape": list(shape),
        "weight": list(weight.shape), "dtype": str(weight.dtype), "ins": ins, "outs": outs,
        "settings": str(module.extra_repr()),
    }  # fmt: skip
    seconds = cache.load(key)
    if seconds is None:
        seconds = {f"{i},{o}": _time(module, shape, i, o, depthwise) for i in ins for o in outs}
        cache.store(key, seconds)
    grid = np.array([[seconds[f"{i},{o}"] for o in outs] for i in ins])
    return LayerTable(name, np.array(ins, float), np.array(outs, float), grid, in_channels, out_channels)


def _resized(
    module: nn.Module, shape: tuple[int, ...], inputs: int, outputs: int, depthwise: bool
) -> tuple[nn.Module, Tensor]:
    """The same layer at other widths with random weights, and a random input for it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Linear):
        size: tuple[int, ...] = (*shape[:-1], inputs)
        layer: nn.Module = nn.Linear(inputs, outputs, module.bias is not None)
    else:
        assert isinstance(module, _ConvNd)
        groups = outputs if depthwise else module.groups
        channels = groups if depthwise else inputs if module.transposed else inputs * groups
        options: dict[str, Any] = {
            name: getattr(module, name)
            for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        if module.transposed:
            options["output_padding"] = module.output_padding
            outputs *= groups
        size = (shape[0], channels, *shape[2:])
        layer = type(module)(channels, outputs, groups=groups, bias=module.bias is not None, **options)
    layer.to(weight.device, weight.dtype)
    return layer, torch.randn(size, device=weight.device, dtype=weight.dtype)


def _time(module: nn.Module, shape: tuple[int, ...], inputs: int, outputs: int, depthwise: bool) -> float:
    """Median seconds of one call at the given widths, on random data."""
    layer, x = _resized(module, shape, inputs, outputs, depthwise)
    return measure_latency(layer, x, warmup=2, repeats=_REPEATS, min_seconds=0.0).median


def _calibrated(
    model: nn.Module, inputs: ExampleInputs, graph: ChannelGraph, tables: tuple[LayerTable, ...]
) -> LatencyCost:
    raw = LatencyCost(graph, tables, 1.0, 0.0)
    half = np.ones(graph.num_channels, dtype=bool)
    rng = np.random.default_rng(0)
    for group in graph.groups:
        half[group.start + rng.choice(group.size, group.size // 2, replace=False)] = False
    thin = apply_plan(model, CompactionPlan.from_mask(graph, half))
    times = compare_latency({"dense": model, "thin": thin}, inputs, min_seconds=0.3)
    dense, thinned = times["dense"].median, times["thin"].median
    spread = raw.dense - raw.cost(half)
    scale = max((dense - thinned) / spread, 0.1) if spread > 0 else 1.0
    return LatencyCost(graph, tables, scale, max(dense - scale * raw.dense, 0.0))
