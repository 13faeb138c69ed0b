"""The candidates for one layer.

``vendor``: torch's convolution at the layer's width, ``vendor_padded`` at multiples of 8, ``vendor_fused`` that as one call of
cuDNN with bias, sum and ReLU, ``dense`` at the width before pruning; ``own``: ours, ``own_groups`` with tiles of warp groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import variables
from benchmarks.gpu.shapes import Layer, padded
from benchmarks.gpu.timing import Loop, buffers_needed
from lightning_prune.inference.sites import FoldedConv2d
from lightning_prune.nn import CompactConv2d
from lightning_prune.ops.availability import CanRun, can_run_compact_conv2d

LAST = torch.channels_last
#: lets our convolution choose tiles of warp groups; read on every call
GROUPS = "LIGHTNING_PRUNE_CUDA_GROUPS"


@dataclass
class Candidate:
    """A module and the argument tuples among which its calls rotate."""

    name: str
    call: Callable[..., Tensor]
    arguments: list[tuple[Tensor, ...]]
    outputs: int
    #: variables that are set while it is called or captured
    variables: dict[str, str] = field(default_factory=dict)

    def loop(self, graph: bool = True) -> Loop:
        """To be timed; a captured call keeps what the variables made of it."""
        with variables(**self.variables):
            return Loop(self.call, self.arguments, graph)


class FusedVendor(nn.Module):
    """Convolution, bias, sum and ReLU as one call of cuDNN."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.to(memory_format=LAST)  # type: ignore[call-overload]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``relu(conv(x) + residual)``."""
        conv = self.conv
        place = (conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, conv.weight, *place)
        return torch.cudnn_convolution_add_relu(x, conv.weight, residual, 1.0, *place)

    @staticmethod
    def exists(device: str) -> bool:
        """Whether this torch and this device have it."""
        return device == "cuda" and all(
            hasattr(torch, f"cudnn_convolution_{n}") for n in ("relu", "add_relu")
        )


def warp_groups(device: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels with products of warp groups: 16-bit types on sm_90."""
    return device == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability()[0] == 9


def kernels_run(device: str, dtype: torch.dtype) -> CanRun:
    """Whether our convolution is compiled for the device: without it, plain torch code would run under our name."""
    return can_run_compact_conv2d(torch.empty(0, 8, 4, 4, device=device, dtype=dtype))


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
    if FusedVendor.exists(device):
        forms.append(("vendor_fused", FusedVendor(widened(conv, layer)), wide, layer.inputs))
    if kernels_run(device, dtype).ok:
        own = CompactConv2d.from_conv(conv, None, "relu", backend="own")
        forms.append(("own", own, layer, layer.inputs))
        if warp_groups(device, dtype) and layer.groups == 1:
            forms.append(("own_groups", own, layer, layer.inputs))
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
        if name.startswith("own"):
            inputs = [x[:, : layer.inputs] for x in inputs]
            sums = [padded_maps(r) if layer.outputs % 8 else r for r in sums]
        arguments = list(zip(inputs, sums, strict=True)) if sums else [(x,) for x in inputs]
        switched_on = {GROUPS: "1"} if name == "own_groups" else {}
        found.append(Candidate(name, module, arguments, shape.outputs, switched_on))
    return found


def _vendor(conv: nn.Conv2d) -> nn.Module:
    return FoldedConv2d(conv, "relu").to(memory_format=LAST).eval()  # type: ignore[call-overload]


def relative_error(layer: Layer, candidate: Candidate, reference: Tensor) -> float:
    """Largest difference from the float64 ``reference`` (first images) over its largest value."""
    with torch.no_grad(), variables(**candidate.variables):
        y = candidate.call(*candidate.arguments[0])
    found = y[: len(reference), : layer.outputs].double()
    if not bool(found.isfinite().all()):
        return float("nan")
    return float((found - reference).abs().max() / reference.abs().max())


def exact(layer: Layer, vendor: Candidate, conv: nn.Conv2d, images: int = 2) -> Tensor:
    """The layer in float64 on the first images of the first buffer."""
    doubled = [a[:images].double() for a in vendor.arguments[0]]
    # One call: trying every float64 kernel of the vendor for it would take longer than the measurements.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False):
        y = torch.nn.functional.conv2d(
            doubled[0],
            conv.weight.double(),
            conv.bias.double(),
            padding=layer.kernel // 2,
            groups=layer.groups,
        )
        return torch.relu(y + doubled[1] if len(doubled) > 1 else y)
