"""What is different on a GPU: tf32, captured measurements, room behind the channels. The last tests need one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import optimize_for_inference
from lightning_prune.inference import choice, optimize
from lightning_prune.inference.sites import ConvSite
from lightning_prune.ops import tensor_cores
from tests.inference.networks import network

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
X = torch.randn(2, 3, 16, 16)


class Rounding(nn.Module):
    """Its outputs move by ``step`` where tf32 is allowed."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + (self.step if torch.backends.cudnn.allow_tf32 else 0.0)


@pytest.mark.parametrize(("step", "expected"), [(0.0, 1e-4), (1e-3, 3e-3), (1.0, 1e-2)])
def test_tolerance_follows_what_tf32_costs(
    step: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "_rounds_to_tf32", lambda base: True)
    base = Rounding(step)
    x = torch.ones(2, 3)
    assert optimize._limit(base, base, x, None) == pytest.approx(expected, rel=2e-3)
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.enabled
    double = copy.deepcopy(base).double()
    assert optimize._limit(double, double, x.double(), None) == 1e-9


def test_a_cpu_network_does_not_round() -> None:
    assert not optimize._rounds_to_tf32(Rounding(0.0))


def test_maps_are_measured_in_the_layout_of_a_network() -> None:
    x = torch.randn(2, 5, 4, 4)
    assert choice._laid_out(x, "contiguous", "own").is_contiguous()
    assert choice._laid_out(x, "channels_last", "own").is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(tensor_cores.with_room(x), x)
    assert tensor_cores.with_room(x).stride() == (8 * 16, 1, 8 * 4, 8)


@pytest.mark.parametrize("name", ["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "own"])
class TestOnAGpu:
    pytestmark = needs_gpu

    def test_optimized_networks_agree_with_float64(
        self, name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
        model, x = network(name).cuda().eval(), X.cuda()
        fast = optimize_for_inference(model, x, dtype=dtype, cuda_graph=True)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            found = fast(x.to(dtype))
        bound = {torch.float32: 1e-2, torch.bfloat16: 5e-2}[dtype]
        assert (found.double() - exact).abs().max() <= bound * exact.abs().max()
        if backend == "own":
            assert "own" in fast.layers.values()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_device_times_of_a_layer(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(37, 41, 3, padding=1).eval().cuda()
    site = ConvSite("conv", conv, None, "relu", True, (2, 37, 14, 14))
    times = choice._measure(site, dtype, torch.device("cuda"))
    kinds = {f"{kind}/{name}" for kind in ("own", "vendor") for name in choice.FORMATS}
    assert set(times) == {*kinds, "padded/channels_last"}
    assert all(0 < seconds < 0.1 for seconds in times.values())
