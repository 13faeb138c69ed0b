"""Optimised networks against the originals in float64, and how they behave as modules."""

from __future__ import annotations

import copy
import io
import threading
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune import TraceError, ops, optimize_for_inference
from lightning_prune.inference import OptimizedModule
from lightning_prune.inference.folded import FoldedConv2d
from lightning_prune.inputs import call_model
from lightning_prune.nn import CompactConv2d
from tests.inference.networks import NETWORKS, network

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
needs_extension = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


def run(model: nn.Module, x: Any = X) -> list[Tensor]:
    with torch.inference_mode():
        return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def kinds(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "backend"),
    [*product(NETWORKS, ("own", "vendor")), *product(("plain", "branching", "odd"), ("auto",))],
)
def test_equals_the_original_in_float64(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
    model = network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = optimize_for_inference(model, X)
    other = torch.randn(5, 3, 16, 16)  # another batch than the example's
    for x in (X, other, X.contiguous(memory_format=torch.channels_last)):
        exact = run(copy.deepcopy(model).double(), x.double().contiguous())
        found = run(fast, x)
        assert len(exact) == len(found) > 0
        for a, b in zip(exact, found, strict=True):
            assert b.dtype == torch.float32
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module.training for module in fast.modules())


@pytest.mark.parametrize(
    ("name", "norms", "activations", "convolutions"),
    [
        ("plain", 0, 1, 4),  # the ReLU of the dense layer
        ("residual", 0, 0, 21),
        ("concat", 0, 0, 3),
        ("depthwise", 0, 0, 3),
        ("shared", 0, 0, 2),  # two copies of the convolution, one for each norm
        ("flattening", 0, 0, 1),
        ("branching", 0, 1, 2),  # what is called twice stays
        ("peeking", 1, 1, 1),
        ("peeking, branching", 1, 1, 1),
    ],
)
def test_what_is_fused(
    name: str, norms: int, activations: int, convolutions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "vendor")
    fast = optimize_for_inference(network(name), X)
    assert kinds(fast, nn.BatchNorm2d) == norms
    assert sum(kinds(fast, kind) for kind in (nn.ReLU, nn.ReLU6, nn.SiLU)) == activations
    assert kinds(fast, FoldedConv2d) == convolutions
    assert kinds(fast, CompactConv2d) == 0


def test_residual_sums_are_fused_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "vendor")
    fast = optimize_for_inference(network("residual"), X)
    functions = [node for node in fast.network.graph.nodes if node.op == "call_function"]
    assert functions == []  # nine sums and nineteen ReLUs are in the convolutions; the mean is a method
    calls = [node for node in fast.network.graph.nodes if node.op == "call_module"]
    assert sum(len(node.args) == 2 for node in calls) == 9


@needs_extension
def test_own_kernels_take_every_convolution_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")
    assert kinds(optimize_for_inference(network("residual"), X), CompactConv2d) == 21
    odd = optimize_for_inference(network("odd"), X)
    assert set(odd.layers) == {"reflect", "same"}  # the others are not plain convolutions
    assert set(odd.layers.values()) == {"vendor"}
    assert (kinds(odd, CompactConv2d), kinds(odd, FoldedConv2d)) == (
        0,
        2,
    )  # neither padding is symmetric zeros


def test_a_forward_that_never_repeats_itself_is_left_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.calls = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(self.conv(x)) * self.calls

    fast = optimize_for_inference(Counting(), X)
    assert isinstance(fast.network, Counting)
    assert fast.layers == {}


def test_what_symbolic_tracing_gets_wrong_is_found_by_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.fx does not see a hook on the outermost module."""
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "vendor")
    model = network("plain")
    model.register_forward_hook(lambda module, args, output: 2 * output)
    fast = optimize_for_inference(model, X)
    assert type(fast.network) is type(model)
    assert kinds(fast, nn.BatchNorm2d) == 0
    torch.testing.assert_close(run(fast)[0], run(model)[0], rtol=1e-4, atol=1e-5)


def test_training_models_become_evaluation_models_and_stay_so() -> None:
    model = network("plain").train()
    fast = optimize_for_inference(model, X)
    assert model.training
    nn.Sequential(fast).train()
    assert all(not module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert torch.equal(run(fast)[0], run(fast)[0])  # no dropout


def test_gradients_reach_the_input() -> None:
    model = network("depthwise")
    fast = optimize_for_inference(model, X)
    grads = []
    for net in (model, fast):
        x = X.clone().requires_grad_()
        net(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["residual", "branching"])
@pytest.mark.parametrize("backend", ["own", "vendor"])
def test_copies_files_and_state(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", backend)
    fast, other = (optimize_for_inference(network(name, seed), X) for seed in (0, 1))
    expected = run(fast)[0]
    assert torch.equal(run(copy.deepcopy(fast))[0], expected)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert torch.equal(run(torch.load(buffer, weights_only=False))[0], expected)
    if fast.state_dict().keys() == other.state_dict().keys():  # the clock chose the same layers for both
        assert not torch.allclose(run(other)[0], expected)
        other.load_state_dict(fast.state_dict())
        if other.memory_format == fast.memory_format:
            assert torch.equal(run(other)[0], expected)
        else:  # another order of summation
            torch.testing.assert_close(run(other)[0], expected, rtol=1e-4, atol=1e-5)


def test_many_threads_at_once() -> None:
    fast = optimize_for_inference(network("residual"), X)
    inputs = [torch.randn(1 + i % 3, 3, 16, 16) for i in range(8)]
    expected = [run(fast, x)[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(10) if not torch.equal(run(fast, inputs[i])[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inputs_by_position_and_keyword() -> None:
    model = network("flattening")
    bias = torch.randn(3)
    for inputs in (
        {"image": X},
        (X, 3.0),
        {"image": X, "bias": bias},
        {"scale": 0.5, "image": X},
        [X, 1.0, bias],
    ):
        fast = optimize_for_inference(model, inputs)
        assert kinds(fast, nn.BatchNorm2d) == 0 or "norm" not in dict(fast.named_modules())
        with torch.no_grad():
            torch.testing.assert_close(
                call_model(fast, inputs), call_model(model, inputs), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-2), (torch.float64, 1e-6)])
def test_other_dtypes(dtype: torch.dtype, bound: float) -> None:
    model = network("plain")
    fast = optimize_for_inference(model, X, dtype=dtype)
    result = run(fast)[0]
    exact = run(copy.deepcopy(model).double(), X.double())[0]
    assert result.dtype == dtype
    assert (result.double() - exact).abs().max() <= bound * exact.abs().max()
    assert all(t.dtype == dtype for t in fast.state_dict().values() if t.is_floating_point())


@pytest.mark.parametrize("mode", ["own", "auto"])
def test_bfloat16_modules_stay_what_they_are(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", mode)
    model = network("plain").bfloat16()
    fast = optimize_for_inference(model, X.bfloat16())
    result = run(fast, X.bfloat16())[0]
    exact = run(copy.deepcopy(model).double(), X.bfloat16().double())[0]
    assert result.dtype == torch.bfloat16
    assert (result.double() - exact).abs().max() <= 5e-2 * exact.abs().max()
    assert any(kind == "own" for kind in fast.layers.values()) or mode == "auto"


def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("plain")
    with pytest.raises(ValueError, match="cuda_graph must be"):
        optimize_for_inference(model, X, cuda_graph="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch.int8"):
        optimize_for_inference(model, X, dtype=torch.int8)
    with pytest.raises(TraceError, match="forward failed on the example input"):
        optimize_for_inference(model, torch.randn(1, 7, 16, 16))
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="LIGHTNING_PRUNE_BACKEND must be one of auto, own, vendor; got 'fast'"
    ):
        optimize_for_inference(model, X)


def test_nothing_is_captured_on_a_cpu() -> None:
    fast = optimize_for_inference(network("plain"), X, cuda_graph=True)
    assert isinstance(fast, OptimizedModule)
    assert not fast.capture(X)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_calls_give_copies_and_other_shapes_run_eagerly() -> None:
    model, x = network("residual").cuda(), X.cuda()
    fast = optimize_for_inference(model, x, cuda_graph=True)
    first = run(fast, x)[0]
    kept = first.clone()
    second = run(fast, 2 * x)[0]
    assert torch.equal(first, kept)
    for found, given in ((first, x), (second, 2 * x), (run(fast, x[:1])[0], x[:1])):
        torch.testing.assert_close(found, run(model, given)[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(run(copy.deepcopy(fast), x)[0], first)
