"""Dead channels are never read, written to or computed: NaN in all of them changes no bit of any result."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_prune.ops import reference_conv_norm
from tests.ops.conv_cases import error

OP = torch.ops.lightning_prune
NAN = float("nan")
RESULTS = (
    "output",
    "gradient of x",
    "gradient of weight",
    "gradient of bias",
    "gradient of the inputs' gate",
)


class Conv(NamedTuple):
    """A convolution whose channels are dead at random; ``size`` of the map's edges."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    size: int
    batch: int


CONVOLUTIONS = {
    "tiny": Conv(4, 4, 3, 1, 1, 5, 2),
    "3x3": Conv(40, 40, 3, 1, 1, 12, 4),
    "3x3 in lanes": Conv(16, 13, 3, 1, 1, 16, 16),
    "3x3 on maps of four pixels": Conv(64, 64, 3, 1, 1, 2, 16),
    "3x3 on small maps": Conv(96, 80, 3, 1, 1, 4, 8),
    "few inputs": Conv(6, 40, 3, 1, 1, 20, 4),
    "few outputs": Conv(40, 6, 3, 1, 1, 20, 4),
    "stride 2": Conv(40, 40, 3, 2, 1, 12, 4),
    "1x1": Conv(40, 24, 1, 1, 1, 9, 4),
    "7x7": Conv(16, 20, 7, 2, 1, 20, 3),
    "depthwise": Conv(24, 24, 3, 1, 24, 10, 3),
    "depthwise, stride 2": Conv(24, 24, 5, 2, 24, 11, 3),
    "grouped": Conv(12, 12, 3, 1, 2, 8, 4),
}
ALGORITHMS = ("auto", "direct", "winograd2", "winograd4")


def some(count: int, generator: torch.Generator) -> Tensor:
    """Three fifths of the channels."""
    return torch.randperm(count, generator=generator)[: max(1, count * 3 // 5)].sort().values


def dead(live: Tensor, count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool).index_fill(0, live, False)


def poisoned(tensor: Tensor, *rows: tuple[int, Tensor]) -> Tensor:
    """NaN at the given positions of the given dimensions, in the same memory format."""
    result = tensor.clone(memory_format=torch.preserve_format)
    for dim, gone in rows:
        result.index_fill_(dim, gone.nonzero().flatten(), NAN)
    return result


def results(
    tensors: list[Tensor], grad: Tensor, live: tuple[Tensor, Tensor], settings: tuple[Any, ...], gated: bool
) -> list[Tensor]:
    x, weight, bias, gate = (
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    )
    y = OP.masked_conv2d(x, weight, bias, None, *live, *settings, gate if gated else None)
    leaves = [x, weight, bias, *([gate] if gated else [])]
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_no_result_of_a_convolution_depends_on_the_dead(
    target: torch.device, name: str, dtype: torch.dtype, last: bool, gated: bool
) -> None:
    if target.type == "cuda":
        pytest.skip("algorithms and gates of inputs are the CPU's")
    inputs, outputs, kernel, stride, groups, size, batch = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(inputs + outputs)

    def randn(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=dtype)
        return t.to(memory_format=torch.channels_last) if last and len(shape) == 4 else t

    # of groups, the same offset of each
    live_in = torch.tensor([0, 2, 4, 6, 8, 10]) if groups == 2 else some(inputs, generator)
    live = live_in, live_in if groups == inputs else some(outputs, generator)
    dead_in, dead_out = dead(live[0], inputs), dead(live[1], outputs)
    tensors = [
        randn(batch, inputs, size, size),
        randn(outputs, inputs // groups, kernel, kernel),
        randn(outputs),
        randn(inputs),
    ]
    columns = [(1, dead_in)] if groups == 1 else []
    spoiled = [
        poisoned(tensors[0], (1, dead_in)),
        poisoned(tensors[1], (0, dead_out), *columns),
        poisoned(tensors[2], (0, dead_out)),
        poisoned(tensors[3], (0, dead_in)),
    ]
    fits = kernel == 3 and stride == 1 and groups == 1 and dtype == torch.float32
    for algorithm in ALGORITHMS if fits else ALGORITHMS[:2]:
        for activation in ("none", "relu"):
            settings = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups, activation, algorithm)
            shape = OP.masked_conv2d(*tensors[:3], None, *live, *settings).shape
            grad = randn(*shape)
            expected = results(tensors, grad, live, settings, gated)
            found = results(spoiled, poisoned(grad, (1, dead_out)), live, settings, gated)
            for what, a, b in zip(RESULTS, found, expected, strict=False):
                assert torch.equal(a, b), (algorithm, activation, what)
            assert not found[0][:, dead_out].any()
            assert not found[1][:, dead_in].any()
            assert not found[2][dead_out].any()
            if groups == 1:
                assert not found[2][:, dead_in].any()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [5, 16, 40])
def test_no_result_of_a_convolution_with_its_norm_depends_on_the_dead(
    target: torch.device, channels: int, kernel: int, last: bool
) -> None:
    if target.type == "cuda":
        pytest.skip("one operator on the CPU alone")
    generator = torch.Generator().manual_seed(channels)

    def randn(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator)
        return t.to(memory_format=torch.channels_last) if last and len(shape) == 4 else t

    live_in, live_out = some(channels, generator), some(channels, generator)
    gone_in, gone_out = dead(live_in, channels), dead(live_out, channels)
    lists = (live_in, live_out, True, [1, 1, kernel // 2, kernel // 2, 1, 1, 1])
    x, residual, grad = (randn(4, len(live), 10, 10) for live in (live_in, live_out, live_out))
    weight, bias, gate = randn(channels, channels, kernel, kernel), randn(channels), randn(channels)
    scale, shift = randn(channels), randn(channels)

    def run(poison: bool) -> list[Tensor]:
        def with_nan(tensor: Tensor, *rows: tuple[int, Tensor]) -> Tensor:
            return poisoned(tensor, *rows) if poison else tensor

        own = with_nan(weight, (0, gone_out), (1, gone_in)), with_nan(bias, (0, gone_out))
        vectors = with_nan(scale, (0, gone_out)), with_nan(shift, (0, gone_out))
        arguments = (x, *own, with_nan(gate, (0, gone_in)), *lists, residual, *vectors, live_out, channels)
        y, *kept = OP.masked_conv_norm_act(*arguments, 1e-5, "relu", None, None, None, 0.1)
        return [y, *kept, *OP.masked_conv_norm_act_backward(grad, *kept, *arguments, 1e-5, "relu", 0b1111111)]

    expected = run(False)
    for a, b in zip(run(True), expected, strict=True):
        assert torch.equal(a, b)
    wide = [None if t is None else t.double() for t in (x, weight, bias, gate)]
    exact = reference_conv_norm.masked_conv_norm_act(
        *wide, *lists, residual.double(), scale.double(), shift.double(), live_out, channels, 1e-5, "relu"
    )
    assert error(expected[0], exact[0]) < 2e-5
