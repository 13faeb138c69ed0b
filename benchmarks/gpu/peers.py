"""The candidates for one layer: torch's convolution at the layer's width, padded to 8, at the dense width, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.shapes import Layer, padded
from benchmarks.gpu.timing import buffers_needed
from lightning_prune.inference.sites import FoldedConv2d
from lightning_prune.nn import CompactConv2d

LAST = torch.channels_last


@dataclass
class Candidate:
    """A module and the argument tuples among which its calls rotate."""

    name: str
    call: Callable[..., Tensor]
    arguments: list[tuple[Tensor, ...]]
    outputs: int


def padded_maps(x: Tensor) -> Tensor:
    """A copy of ``x`` in channels_last with a channel stride that is a multiple of 8, its spare lanes zero."""
    n, c, h, w = x.shape
    room = x.new_zeros(n, padded(c), h, w).contiguous(memory_format=LAST)
    room[:, :c] = x
    return room[:, :c]


def convolution(layer: Layer, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Conv2d:
    """Random weights scaled so that outputs are near one, the same for every width that contains them."""
    generator = torch.Generator().manual_seed(seed)
    o, c, kh, kw = layer.weight_shape
    weight = torch.randn(o, c, kh, kw, generator=generator) / (c * kh * kw) ** 0.5
    bias = torch.randn(o, generator=generator)
    conv = nn.Conv2d(layer.inputs, o, kh, padding=kh // 2, groups=layer.groups)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return conv.to(device, dtype).eval().requires_grad_(False)


def widened(conv: nn.Conv2d, layer: Layer) -> nn.Conv2d:
    """``conv`` at the padded width of ``layer``: zeros behind its weights."""
    wide = convolution(layer.with_padding(), str(conv.weight.device), conv.weight.dtype)
    o, c = conv.weight.shape[:2]
    with torch.no_grad():
        for target, source in ((wide.weight[:o, :c], conv.weight), (wide.bias[:o], conv.bias)):
            target.copy_(source)
        wide.weight[o:], wide.weight[:, c:], wide.bias[o:] = 0, 0, 0
    return wide


def _maps(
    layer: Layer, channels: int, room: int, count: int, device: str, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Random maps of ``channels`` channels, channels_last, with zeros up to ``room`` channels."""
    found = []
    for i in range(count):
        generator = torch.Generator(device).manual_seed(1000 * seed + i)
        shape = (layer.batch, channels, layer.size, layer.size)
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        if room == channels:
            found.append(x.contiguous(memory_format=LAST))
        else:
            wide = x.new_zeros(layer.batch, room, layer.size, layer.size).contiguous(memory_format=LAST)
            wide[:, :channels] = x
            found.append(wide)
    return found


def candidates(layer: Layer, device: str, dtype: torch.dtype, cache: float) -> list[Candidate]:
    """The layer in every form; all but ``dense`` compute the same numbers."""
    count = buffers_needed(layer.bytes(dtype.itemsize), cache)
    conv, wide = convolution(layer, device, dtype), layer.with_padding()
    forms: list[tuple[str, Any, Layer, int]] = [("vendor", _vendor(conv), layer, layer.inputs)]
    if wide != layer:
        forms.append(("vendor_padded", _vendor(widened(conv, layer)), wide, layer.inputs))
    forms.append(("own", CompactConv2d.from_conv(conv, None, "relu", backend="own"), layer, layer.inputs))
    if layer.kind != "aligned":
        forms.append(
            ("dense", _vendor(convolution(layer.dense(), device, dtype)), layer.dense(), layer.dense().inputs)
        )
    found = []
    for name, module, shape, channels in forms:
        room = padded(channels) if name != "vendor" else channels
        inputs = _maps(shape, channels, room, count, device, dtype, seed=1)
        sums = (
            _maps(shape, layer.outputs, shape.outputs, count, device, dtype, seed=2) if layer.residual else []
        )
        if name == "own":
            inputs = [x[:, : layer.inputs] for x in inputs]
            sums = [padded_maps(r) if layer.outputs % 8 else r for r in sums]
        arguments = list(zip(inputs, sums, strict=True)) if sums else [(x,) for x in inputs]
        found.append(Candidate(name, module, arguments, shape.outputs))
    return found


def _vendor(conv: nn.Conv2d) -> nn.Module:
    return FoldedConv2d(conv, "relu").to(memory_format=LAST).eval()  # type: ignore[call-overload]


def relative_error(layer: Layer, candidate: Candidate, reference: Tensor) -> float:
    """Largest difference from the float64 ``reference`` (first images) over its largest value."""
    with torch.no_grad():
        y = candidate.call(*candidate.arguments[0])
    found = y[: len(reference), : layer.outputs].double()
    if not bool(found.isfinite().all()):
        return float("nan")
    return float((found - reference).abs().max() / reference.abs().max())


def exact(layer: Layer, vendor: Candidate, conv: nn.Conv2d, images: int = 2) -> Tensor:
    """The layer in float64 on the first images of the first buffer."""
    doubled = [a[:images].double() for a in vendor.arguments[0]]
    with torch.no_grad():
        y = torch.nn.functional.conv2d(
            doubled[0],
            conv.weight.double(),
            conv.bias.double(),
            padding=layer.kernel // 2,
            groups=layer.groups,
        )
        return torch.relu(y + doubled[1] if len(doubled) > 1 else y)
