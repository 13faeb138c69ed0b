"""A network of a single module is called without its graph, unless somebody could tell."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference import OptimizedModule

pytestmark = pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")


@pytest.fixture(autouse=True)
def own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")


def layers(count: int) -> nn.Module:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(count)]
    return nn.Sequential(*stages).eval()


def graph_calls(fast: OptimizedModule, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the graph, without hanging anything on it."""
    calls: list[int] = []
    real = type(fast.network).forward

    def counting(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(fast.network), "forward", counting)
    return calls


@pytest.mark.parametrize("count", [1, 2, 8])  # a convolution, two of them, one segment
def test_the_graph_is_skipped_where_it_calls_one_module(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layers(count), torch.randn(1, 4, 8, 8)
    fast = optimize_for_inference(model, x)
    assert isinstance(fast, OptimizedModule)
    assert isinstance(fast.network, fx.GraphModule)
    calls = graph_calls(fast, monkeypatch)
    children = len([n for n in fast.network.graph.nodes if n.op == "call_module"])
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(fast)(x), expected, rtol=1e-4, atol=1e-5)
        assert (len(calls) > 0) == (children > 1)
        torch.testing.assert_close(fast(input=x), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1 + (children > 1)  # the copy has a class of its own


def test_hooks_and_replaced_modules_count() -> None:
    model, x = layers(1), torch.randn(1, 4, 8, 8)
    fast = optimize_for_inference(model, x)
    assert isinstance(fast, OptimizedModule)
    seen: list[str] = []
    with fast.network.register_forward_hook(lambda *_: seen.append("network")):
        fast(x)
    assert seen == ["network"]
    (name,) = [str(n.target) for n in fast.network.graph.nodes if n.op == "call_module"]
    path, _, last = name.rpartition(".")
    setattr(fast.network.get_submodule(path), last, nn.Identity())
    assert fast(x) is x
    with torch.no_grad():
        compiled = torch.compile(optimize_for_inference(model, x), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
