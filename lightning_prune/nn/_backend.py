"""Which implementation computes a `CompactConv2d` here: this package's, torch's, or oneDNN with prepacked weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune import ops
from lightning_prune.ops._library import output_format, output_shape
from lightning_prune.ops.availability import can_run_compact_conv2d
from lightning_prune.ops.reference import check_input, check_residual
from lightning_prune.ops.tensor_cores import rows_of_channels

Run = Callable[[Tensor, "Tensor | None"], Tensor]
#: signatures of one module's inputs that are measured and remembered; what comes later runs our kernel
LIMIT = 8


@dataclass(frozen=True)
class Layer:
    """What a convolution computes, whoever computes it."""

    weight: Tensor
    bias: Tensor | None
    in_index: Tensor | None
    out_index: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    activation: str
    #: elements of our packed weight, which say what algorithm it is packed for, and so which kernel runs
    packed: int


def vendor(layer: Layer, x: Tensor) -> Run:
    """Torch's convolution in x's memory format."""
    last = torch.channels_last if x.is_cuda and rows_of_channels(x) else output_format(x)
    weight = layer.weight.contiguous(memory_format=last)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        given = x if layer.in_index is None else x.index_select(1, layer.in_index)
        y = F.conv2d(given, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return _finished(layer, y, residual)

    return run


def prepacked(layer: Layer, x: Tensor) -> Run | None:
    """Torch's oneDNN with the weight in its own layout, sum and ReLU fused, as in frozen graphs; None where it cannot."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not fits or output_format(x) is not torch.channels_last:
        return None
    settings = (layer.padding, layer.stride, layer.dilation, layer.groups)
    shape = [x.shape[0], layer.weight.shape[1] * layer.groups, *x.shape[2:]]
    try:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed = reorder(layer.weight.to_mkldnn(), *settings, shape)
        convolve = torch.ops.mkldnn._convolution_pointwise
    except (AttributeError, RuntimeError):  # not part of torch's public interface
        return None
    fused = layer.activation in ("relu", "none")
    after = layer.activation if fused else "none"
    then = "relu" if layer.activation == "relu" else None
    geometry = (layer.stride, layer.padding, layer.dilation)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        given = x if layer.in_index is None else x.index_select(1, layer.in_index)
        if residual is None:
            y = convolve(given, packed, layer.bias, *settings, after, [], "")
            return y if fused else _finished(layer, y, None)
        adds = fused and layer.out_index is None and residual.dtype == x.dtype
        if adds and residual.shape == output_shape(x, layer.weight.shape, *geometry):
            return convolve.binary(given, residual, packed, layer.bias, *settings, "add", 1.0, then, [], "")
        return _finished(layer, convolve(given, packed, layer.bias, *settings, "none", [], ""), residual)

    return run


def _finished(layer: Layer, y: Tensor, residual: Tensor | None) -> Tensor:
    if layer.out_index is not None:
        assert residual is not None
        check_residual(residual, y.shape, residual.shape[1] if residual.dim() == 4 else None)
        y = residual.index_add(1, layer.out_index, y)
    elif residual is not None:
        check_residual(residual, y.shape)
        y = y.add_(residual)
    return y.relu_() if layer.activation == "relu" else ops.ACTIVATIONS[layer.activation](y)


class Chooser:
    """The choice of one module, per signature of its input; forgotten by copies and pickles.

    A call of a known signature costs one look-up; what must be asked besides is asked when a signature is new.

    Args:
        layer: makes the layer's description, with the weight unpacked; called when something is measured.
        own: our kernel, for inputs that it takes.
        reference: ours for every other input.
    """

    def __init__(self, layer: Callable[[], Layer], own: Run, reference: Run) -> None:
        self._layer, self._own, self._reference = layer, own, reference
        self._chosen: dict[Any, Run] = {}

    def choose(self, backend: str, x: Tensor, residual: Tensor | None) -> Run:
        """The implementation for inputs like ``x``: ours, or another one where it is faster or asked for."""
        key = (
            backend, x.shape, x.stride(), x.dtype, x.device, residual is None, torch.get_num_threads(),
            x.requires_grad and torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return self._chosen.get(key) or self._new(key, backend, x, residual)

    def _new(self, key: Any, backend: str, x: Tensor, residual: Tensor | None) -> Run:
        mode = backend.strip().lower() or "auto"
        if mode not in ("auto", "own", "vendor"):
            raise ValueError(f"LIGHTNING_PRUNE_BACKEND must be one of auto, own, vendor; got {backend!r}")
        check_input(x)
        ours = self._own if can_run_compact_conv2d(x).ok else self._reference
        gradient = x.requires_grad and torch.is_grad_enabled()
        if x.numel() == 0 or (mode == "auto" and x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return ours  # nothing to measure, or not now
        if mode != "vendor" and len(self._chosen) >= LIMIT:
            return ours
        measured = ours is self._own and not torch.are_deterministic_algorithms_enabled()
        if mode == "own" or gradient or (mode == "auto" and not measured):
            self._chosen[key] = ours
        elif mode == "vendor":
            self._chosen[key] = self._vendor(x) or ours
        else:
            from lightning_prune.inference import choice

            with choice.one_at_a_time():
                if key not in self._chosen:  # another thread may have measured meanwhile
                    self._chosen[key] = self._found(ours, x, residual) or ours
        return self._chosen[key]

    def _vendor(self, x: Tensor) -> Run | None:
        layer = self._layer()
        return vendor(layer, x) if layer.weight.dtype == x.dtype else None

    def _found(self, own: Run, x: Tensor, residual: Tensor | None) -> Run | None:
        from lightning_prune.inference import cache, choice

        layer = self._layer()
        if layer.weight.dtype != x.dtype:
            return None  # weights that our kernel converts as it goes
        candidates: dict[str, Run] = {"own": own, "vendor": vendor(layer, x)}
        packed = prepacked(layer, x)
        if packed is not None:
            candidates["prepacked"] = packed
        key = {**cache.environment(x.device), **_described(layer, x, residual)}
        seconds = cache.load(key)
        if seconds is None or set(seconds) != set(candidates):
            with torch.inference_mode(), contextlib.suppress(RuntimeError):
                calls = {name: _bound(run, x, residual) for name, run in candidates.items()}
                seconds = choice._interleaved(calls, x.device)
            if seconds is None:
                return None
            cache.store(key, seconds)
        rival = min((name for name in seconds if name != "own"), key=seconds.__getitem__)
        return None if seconds["own"] * choice.MARGIN <= seconds[rival] else candidates[rival]


def _bound(run: Run, x: Tensor, residual: Tensor | None) -> Callable[[], Tensor]:
    return lambda: run(x, residual)


def _described(layer: Layer, x: Tensor, residual: Tensor | None) -> dict[str, Any]:
    def numbers(values: Sequence[int]) -> list[int]:
        return [int(value) for value in values]

    def channels(index: Tensor | None) -> list[int] | None:
        return None if index is None else cast(list[int], index.tolist())

    return {
        "module": "CompactConv2d", "dtype": str(x.dtype), "input": numbers(x.shape), "input_stride": numbers(x.stride()),
        "weight": numbers(layer.weight.shape), "stride": layer.stride, "padding": layer.padding,
        "dilation": layer.dilation, "groups": layer.groups, "bias": layer.bias is not None, "packed": layer.packed,
        "activation": layer.activation, "gather": channels(layer.in_index), "scatter": channels(layer.out_index),
        "residual": None if residual is None else numbers(residual.stride()),
    }  # fmt: skip


__all__ = ["LIMIT", "Chooser", "Layer", "Run", "prepacked", "vendor"]
