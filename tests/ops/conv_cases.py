"""Random convolutions for the operator tests, and how far a result may be from the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from lightning_prune import ops
from lightning_prune.ops import _loading, reference

# Largest |error| over the largest |reference| (or 1). Sums have up to a few hundred products of standard normals.
TOLERANCE = {
    torch.float64: 1e-12,  # rounding of float64 over the longest sum, with a factor 100 to spare
    torch.float32: 2e-5,  # float32 rounding (6e-8) times sqrt(sum length), and exp to 1 ulp in the activations
    torch.bfloat16: 2e-2,  # one rounding to 8 bits of the result; the inputs are exact
    torch.float16: 2e-3,  # one rounding to 11 bits of the result
}

_FEATURES = _loading.build_info().cpu_features() if ops.extension_available() else {}  # type: ignore[union-attr]
LEVELS = ["portable", *(name for name in ("avx2", "avx512") if _FEATURES.get(name))]


#: where the derivative of an activation jumps
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


def off_kinks(grad: torch.Tensor, before: torch.Tensor, activation: str, tolerance: float) -> torch.Tensor:
    """``grad`` of the outputs, zero where ``before`` the activation a value may be rounded across one of its kinks.

    There the gradient of the rounded value is another one, and right. Values on a kink itself (dead channels, padding) are
    there at every precision.
    """
    before = before.detach().to(grad.device, torch.float64)
    reach = tolerance * float(before.abs().max().clamp(min=1)) if before.numel() else 0.0
    for kink in KINKS.get(activation, ()):
        distance = (before - kink).abs()
        grad = grad.masked_fill((distance > 0) & (distance < reach), 0.0)
    return grad


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the larger of 1 and the largest expected value."""
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.isfinite().all()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


@dataclass
class ConvCase:
    """One drawn convolution; tensors are made by :meth:`tensors`."""

    batch: int
    size: tuple[int, int]
    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    layout: str
    bias: bool
    gate: bool
    live_in: list[int] | None
    live_out: list[int] | None
    activation: str
    dtype: torch.dtype
    seed: int
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def settings(self) -> tuple[Any, ...]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups, self.activation

    @property
    def weight_shape(self) -> list[int]:
        return [self.outputs, self.inputs // self.groups, *self.kernel]

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def input(self, device: torch.device) -> torch.Tensor:
        height, width = self.size
        if self.layout == "strided":  # neither format, with gaps
            return self.randn(self.batch, self.inputs, height + 1, 2 * width)[:, :, 1:, ::2].to(device)
        x = self.randn(self.batch, self.inputs, height, width).to(device)
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x

    def index(self, values: list[int] | None, device: torch.device) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int64, device=device)

    def tensors(self, device: torch.device) -> tuple[Any, ...]:
        """x, weight, bias, gate, live_in, live_out."""
        weight = self.randn(*self.weight_shape).to(device)
        bias = self.randn(self.outputs).to(device) if self.bias else None
        gate = self.randn(self.outputs).to(device) if self.gate else None
        x = self.input(device)
        return x, weight, bias, gate, self.index(self.live_in, device), self.index(self.live_out, device)


def _subset(draw: st.DrawFn, count: int) -> list[int] | None:
    if draw(st.booleans()):
        return None
    return sorted(draw(st.sets(st.integers(0, count - 1), max_size=count)))


@st.composite
def conv_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> ConvCase:
    """Ragged channel counts around the panel widths (8, 16), grouped and depthwise; maps down to 1x1, empty batches."""
    kind = draw(st.sampled_from(["dense", "dense", "grouped", "depthwise"]))
    if kind == "depthwise":
        groups = draw(st.sampled_from([2, 7, 17, 70]))
        inputs, outputs = groups, groups * draw(st.sampled_from([1, 1, 2]))
    else:
        groups = 1 if kind == "dense" else draw(st.integers(2, 4))
        inputs = groups * draw(st.sampled_from([1, 2, 3, 8, 13, 17]))
        outputs = groups * draw(st.sampled_from([1, 3, 8, 9, 16, 17, 33, 49]))
    kernel = (draw(st.sampled_from([1, 1, 2, 3, 5])), draw(st.sampled_from([1, 1, 2, 3])))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    size = tuple(
        max(1, d * (k - 1) + draw(st.sampled_from([1, 2, 5, 9, 16])) - 2 * p * draw(st.integers(0, 1)))
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    )
    size = tuple(
        max(s, d * (k - 1) + 1 - 2 * p) for s, d, k, p in zip(size, dilation, kernel, padding, strict=True)
    )
    return ConvCase(
        batch=draw(st.sampled_from([1, 2, 5, 0])),
        size=(size[0], size[1]),
        groups=groups,
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        layout=draw(st.sampled_from(["contiguous", "channels_last", "strided"])),
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        live_in=_subset(draw, inputs),
        live_out=_subset(draw, outputs),
        activation=draw(st.sampled_from(sorted(ops.ACTIVATIONS))),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
    )


def check_drawn(
    data: st.DataObject,
    algorithm: tuple[str, int],
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """A convolution packed for ``algorithm`` (name, side of the kernel), with everything else that it can have drawn."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    name, kernel = algorithm
    spans = [d * (kernel - 1) + 1 - 2 * p for d, p in zip(dilation, padding, strict=True)]
    height, width = (max(s, span) for s, span in zip(size, spans, strict=True))
    # Results of about one: the activations would hide the size of the sums that were rounded.
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (kernel * inputs**0.5)
    in_index = residual = out_index = None
    channels = inputs
    if data.draw(st.booleans(), label="gather"):
        channels = inputs + 5
        in_index = torch.randperm(channels, generator=generator)[:inputs]
    x = torch.randn(batch, channels, height, width, generator=generator)
    if data.draw(st.booleans(), label="channels_last"):
        x = x.to(memory_format=torch.channels_last)
    bias = torch.randn(outputs, generator=generator) if data.draw(st.booleans(), label="bias") else None
    kind = data.draw(st.sampled_from(["none", "same", "scatter"]), label="residual")
    if kind != "none":
        total = outputs + (7 if kind == "scatter" else 0)
        out_size = [(s - span) // stride + 1 for s, span in zip((height, width), spans, strict=True)]
        residual = torch.randn(batch, total, *out_size, generator=generator)
        if data.draw(st.booleans(), label="residual channels_last"):
            residual = residual.to(memory_format=torch.channels_last)
        if kind == "scatter":
            out_index = torch.randperm(total, generator=generator)[:outputs]
    activation = data.draw(st.sampled_from(sorted(ops.ACTIVATIONS)), label="activation")
    shape = [outputs, inputs, kernel, kernel]
    arguments = (in_index, out_index, shape, [stride, stride], list(padding), list(dilation), 1, activation)
    packed = ops.pack_conv2d_weight(weight, 1, name)
    y = ops.compact_conv2d(x, packed, bias, residual, *arguments)
    double = [None if t is None else t.double() for t in (x, packed, bias, residual)]
    expected = reference.compact_conv2d(*double, *arguments)
    assert y.shape == expected.shape
    assert error(y, expected) < 2e-5


def assert_agrees(
    target: torch.device,
    case: ConvCase,
    in_gated: bool,
    weight_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """``masked_conv2d`` over all channels and its gradients, with a gate of the inputs on the CPU, against float64."""
    x, weight, bias, gate, _, _ = case.tensors(target)
    weight = weight.contiguous(memory_format=weight_format)
    in_gate = case.randn(case.inputs).to(target) if in_gated and target.type == "cpu" else None
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, weight, bias, gate, in_gate)
        if t is not None
    ]
    rest = iter(leaves)
    own = [None if t is None else next(rest) for t in (x, weight, bias, gate, in_gate)]
    y = torch.ops.lightning_prune.masked_conv2d(*own[:4], None, None, *case.settings, "auto", own[4])
    wide = [None if t is None else t.detach().double().requires_grad_() for t in own]
    scaled = wide[0] if wide[4] is None else wide[0] * wide[4][:, None, None]
    expected = reference.masked_conv2d(scaled, *wide[1:4], None, None, *case.settings)
    assert error(y, expected) < TOLERANCE[case.dtype]
    before = reference.masked_conv2d(scaled, *wide[1:4], None, None, *case.settings[:-1], "none")
    grad_y = off_kinks(case.randn(*y.shape).to(target), before, case.activation, TOLERANCE[case.dtype])
    found = torch.autograd.grad(y, leaves, grad_y.contiguous(memory_format=torch.channels_last))
    wanted = torch.autograd.grad(
        expected, [t for t in wide if t is not None], grad_y.double(), allow_unused=True
    )
    for leaf, grad, true in zip(leaves, found, wanted, strict=True):
        true = torch.zeros_like(grad).double() if true is None else true
        gates = {3: (wide[3], (1, 2, 3)), 4: (wide[4], (0, 2, 3))}  # of outputs and of inputs
        at = next((at for at in gates if leaf is own[at]), None)
        if at is not None and case.batch > 0:
            # A sum of products of weights and their gradients, which may be far larger than itself.
            of, others = gates[at]
            products = (wanted[1] * wide[1]).detach().abs().sum(others)
            summands = products / of.detach().abs()
            scale = max(1.0, float(summands.max()))
            assert error(grad / scale, true / scale) < TOLERANCE[case.dtype]
        else:
            assert error(grad, true) < TOLERANCE[case.dtype]
