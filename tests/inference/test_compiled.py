"""Optimised networks under torch.compile, and in a process that did not make them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune import ops, optimize_for_inference
from lightning_prune.inference.segment import CompactSegment
from tests.inference.networks import network

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
LOADS = """
import sys, torch
fast, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.inference_mode():
    found = fast(x)
assert torch.equal(found, expected), float((found - expected).abs().max())
print(sum(type(module).__name__ == "CompactSegment" for module in fast.modules()))
"""


def check(backend: str, name: str) -> None:
    fast = optimize_for_inference(network(name), X)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend=backend)
    with torch.no_grad():
        for x in (X, torch.randn(5, 3, 16, 16)):
            torch.testing.assert_close(compiled(x), fast(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["own", "vendor"])
@pytest.mark.parametrize("name", ["plain", "depthwise", pytest.param("residual", marks=pytest.mark.slow)])
def test_compiled_networks_compute_the_same(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", mode)
    check("aot_eager", name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["own", "vendor"])
def test_compiled_by_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", mode)
    check("inductor", "residual")


@pytest.mark.skipif(not ops.extension_available(), reason="no compiled extension")
def test_segments_fall_apart_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", "own")
    fast = optimize_for_inference(network("residual"), X)
    if not any(isinstance(module, CompactSegment) for module in fast.modules()):
        pytest.skip("the clock chose a network without segments")
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fast, backend=backend, fullgraph=True)(X)
    assert sum("compact_conv2d" in name for name in seen) >= 20
    assert not any("compact_segment" in name for name in seen)


@pytest.mark.parametrize("mode", ["own", "vendor", "auto"])
def test_a_saved_network_computes_the_same_bits_in_a_fresh_process(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_BACKEND", mode)
    fast = optimize_for_inference(network("residual"), X)
    with torch.inference_mode():
        expected = fast(X)
    torch.save((fast, X, expected), tmp_path / "network.pt")
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads({torch.get_num_threads()})\n{LOADS}",
         str(tmp_path / "network.pt")], capture_output=True, text=True, env=dict(os.environ), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(isinstance(module, CompactSegment) for module in fast.modules())
