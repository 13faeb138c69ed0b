"""Which layers are measured, and the least time that their arithmetic and their bytes allow."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

KINDS = ("conv3x3", "pointwise", "depthwise", "aligned")
NARROW, WIDE = tuple(range(33, 41)), tuple(range(97, 105))
BATCHES = (32, 1, 256, 8)


def padded(channels: int, multiple: int = 8) -> int:
    """The next multiple of ``multiple``."""
    return -(-channels // multiple) * multiple


@dataclass(frozen=True)
class Layer:
    """A convolution with bias and ReLU (and a residual sum, for ``pointwise``); stride 1, output as large as the input."""

    kind: str
    inputs: int
    outputs: int
    size: int
    batch: int
    kernel: int = 3
    groups: int = 1
    residual: bool = False

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.outputs, self.inputs // self.groups, self.kernel, self.kernel

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        o, c, kh, kw = self.weight_shape
        return 2 * self.batch * self.size**2 * o * c * kh * kw

    def bytes(self, element: int = 2) -> int:
        """Each input read once, each output written once, at the layer's own width."""
        o, c, kh, kw = self.weight_shape
        maps = self.inputs + self.outputs * (2 if self.residual else 1)
        return element * (self.batch * self.size**2 * maps + o * c * kh * kw + o)

    def with_padding(self) -> Layer:
        """The same layer at widths that are multiples of 8."""
        inputs = padded(self.inputs)
        depthwise = self.groups > 1
        return replace(
            self,
            inputs=inputs,
            outputs=inputs if depthwise else padded(self.outputs),
            groups=inputs if depthwise else 1,
        )

    def dense(self) -> Layer:
        """The layer of the unpruned network: 64 channels for widths to 64, else 128."""
        width = 64 if self.inputs <= 64 else 128
        depthwise = self.groups > 1
        outputs = self.outputs if self.kind == "pointwise" else width
        return replace(self, inputs=width, outputs=outputs, groups=width if depthwise else 1)

    def label(self) -> str:
        return f"{self.kind} {self.inputs}->{self.outputs}@{self.size} n={self.batch}"

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def floor_seconds(
    layer: Layer, flops_per_second: float, bytes_per_second: float, element: int = 2
) -> dict[str, Any]:
    """The roofline: no implementation is faster than the larger of the two times."""
    compute, memory = layer.flops / flops_per_second, layer.bytes(element) / bytes_per_second
    return {"floor_us": 1e6 * max(compute, memory), "bound": "compute" if compute >= memory else "memory"}


def layer(kind: str, width: int, batch: int) -> Layer:
    """The layer of ``kind`` at ``width`` channels: a 56x56 map for narrow, 28x28 for wide layers."""
    size = 56 if width <= 64 else 28
    if kind == "pointwise":  # the last layer of a bottleneck: the stream that it is added to is not pruned
        return Layer(kind, width, 256 if width <= 64 else 512, size, batch, kernel=1, residual=True)
    if kind == "depthwise":
        return Layer(kind, width, width, size, batch, groups=width)
    if kind in ("conv3x3", "aligned"):
        return Layer(kind, width, width, size, batch)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


def selection(quick: bool = False, full: bool = False) -> list[Layer]:
    """Layers in the order of their importance, so that a run that is cut short still answers the first questions."""
    if quick:
        chosen = [layer("conv3x3", 37, 32), layer("conv3x3", 101, 32), layer("pointwise", 37, 32)]
        return [*chosen, layer("depthwise", 37, 32), layer("aligned", 64, 32), layer("conv3x3", 37, 1)]
    few = (37, 101, 33, 97, 40, 104)
    found = [layer("conv3x3", width, 32) for width in (*few, *NARROW, *WIDE)]
    for batch in BATCHES:
        found += [layer(kind, width, batch) for kind in KINDS[:3] for width in few[:2]]
        found += [layer("aligned", width, batch) for width in (64, 128)]
    for batch in BATCHES:
        found += [layer(kind, width, batch) for kind in KINDS[:3] for width in few]
    if full:
        found += [
            layer(k, width, batch) for batch in BATCHES for k in KINDS[:3] for width in (*NARROW, *WIDE)
        ]
    return list(dict.fromkeys(found))


def tiny(given: Layer) -> Layer:
    """The same layer on a 6x6 map of at most two images: exercises the code where nothing is measured."""
    return replace(given, size=6, batch=min(given.batch, 2))
